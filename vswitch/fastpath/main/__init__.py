"""What the main thread does: ports, rings and tables, made for the workers and handed to them."""
