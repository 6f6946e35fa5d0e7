"""What a distribution has no package of: skipped with this reason, and CI lets that be."""

from __future__ import annotations

UNAVAILABLE = "this distribution has no package of"


def why_missing(what: str, *, packaged: bool) -> str:
    """Why the tests of a program that is not there are skipped, as a reason."""
    return f"{what} is not installed" if packaged else f"{UNAVAILABLE} {what}"
