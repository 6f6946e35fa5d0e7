"""Virtual machines for a lab: QEMU and User Mode Linux, their images, and the demo."""
