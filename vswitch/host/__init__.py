"""What the host has for a switch: sockets in its file system, privileges, TAP devices."""
