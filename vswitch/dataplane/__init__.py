"""The main thread's side of the workers: their threads, who serves what, what they leave behind."""
