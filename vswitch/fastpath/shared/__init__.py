"""Structures that the main thread and the workers share, and the code that both need for them."""
