"""What a guest does that no driver would: built by `make setup`, and in no wheel."""
