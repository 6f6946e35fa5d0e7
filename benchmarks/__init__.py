"""Measures vswitch beside other switches: `python -m benchmarks`, explained in docs/performance.md.

A generator on one CPU sends frames in a closed loop through a switch on another CPU. All switches
are started at the beginning; whoever is not being measured is stopped with SIGSTOP.
"""
