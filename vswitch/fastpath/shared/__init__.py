"""Structures that the main thread and the workers share, and the code that both need for them.

"Main" is the thread that runs the event loop. Fields marked *main* change only while no worker can
see the structure (before it is published, or after every worker has passed a quiescent point).
Fields marked *worker* belong to the worker that owns the ring, or to whoever holds `lock`. Fields
marked *atomic* may be read by anyone at any time through atomics.h.
"""
