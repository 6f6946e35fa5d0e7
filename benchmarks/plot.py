"""The rates of a run as a picture: frame size against frames a second, a line each switch."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from benchmarks.errors import MissingError
from benchmarks.samples import Place, Summary

_WIDTH_IN, _HEIGHT_IN = 7.0, 4.2


def lines(
    summaries: Sequence[Summary], generator: str = "software"
) -> tuple[Place | None, dict[str, list[tuple[int, float]]]]:
    """Points (bytes, million frames a second) of each switch in split rings, and where those are.

    The class in which there are more of them; None if nothing was measured.
    """
    rates = [
        one
        for one in summaries
        if (one.case.kind, one.case.generator, one.case.ring) == ("rate", generator, "split")
    ]
    places: tuple[Place, ...] = ("near", "far")
    place = max(places, key=lambda each: sum(one.place == each for one in rates))
    found: dict[str, list[tuple[int, float]]] = {}
    for one in sorted(rates, key=lambda one: one.case.frame_len):
        if one.place == place:
            found.setdefault(one.switch, []).append((one.case.frame_len, one.median / 1e6))
    found = {name: points for name, points in found.items() if len(points) > 1}
    return (place if found else None), found


def draw(summaries: Sequence[Summary], titles: dict[str, str], path: Path) -> bool:
    """Write the picture to `path`, in the format that its suffix names.

    False if there are too few points. MissingError without matplotlib.
    """
    place, found = lines(summaries)
    if place is None:
        return False
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingError(
            "matplotlib is not installed, so there is no plot", hint="pip install 'vswitch[bench]'"
        )
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    # Equal results make equal files.
    mpl.rcParams["svg.hashsalt"] = "vswitch"
    figure, axes = pyplot.subplots(figsize=(_WIDTH_IN, _HEIGHT_IN), layout="constrained")
    try:
        for name, points in found.items():
            style = "--" if name == "null" else "-"
            axes.plot(*zip(*points, strict=True), style, marker="o", label=titles[name])
        lengths = sorted({length for points in found.values() for length, _ in points})
        axes.set_xscale("log")
        axes.set_xticks(lengths, [str(length) for length in lengths], minor=False)
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("frame size in bytes")
        axes.set_ylabel("million frames a second")
        axes.set_title(f"One direction, split rings, {place}")
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    finally:
        pyplot.close(figure)
    return True
