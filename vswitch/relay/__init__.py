"""The relay: a confined process in which the Unix sockets of strangers end, and how to talk to it.

Whoever is connected to a Unix socket can send descriptors that make others wait: to receive, look
at or close them may sleep in the kernel for as long as the sender likes. The event loop has no such
socket.
"""
