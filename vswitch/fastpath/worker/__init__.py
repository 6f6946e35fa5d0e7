"""What a worker does with frames, one stage a file. Workers alone run it."""
