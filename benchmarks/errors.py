"""Errors of a benchmark run."""

from vswitch.errors import VswitchError


class BenchmarkError(VswitchError):
    """A benchmark cannot be run, or a part of it broke."""

    code = "benchmark"


class MissingError(BenchmarkError):
    """Something that only one switch or generator needs is not there; the rest can be measured."""

    code = "missing"
