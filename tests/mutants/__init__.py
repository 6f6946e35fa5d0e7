"""Mutants of the fast path, and which tests kill them: `make mutants`."""
