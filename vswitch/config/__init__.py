"""What a switch is told: settings and their rules, and the file that they are in."""
