"""The process: from the command line to a serving switch, its log, its watchdog."""
