"""What benchmarks measure with and nobody else: built by `make setup`, and in no wheel."""
