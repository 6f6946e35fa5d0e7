"""The device side of virtqueues, split and packed. Workers run it."""
