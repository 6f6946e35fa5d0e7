"""Atomics and what is asked of the kernel, in C headers."""
