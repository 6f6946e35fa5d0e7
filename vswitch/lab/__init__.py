"""Real QEMU guests for the demo and the end-to-end tests.

Nothing here is needed to run the switch: the package obtains a guest kernel, builds an initrd,
boots guests whose network card is a vhost-user port, and talks to a shell inside them.
"""
