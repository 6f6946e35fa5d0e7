"""The command `vswitch bench`: a load generator for any vhost-user switch."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict

import click

from vswitch.bounds import RING_SIZE_MAX
from vswitch.lab.errors import LabError
from vswitch.lab.load.bench import MAX_FRAME_LEN, MIN_FRAME_LEN, Options, measure


@contextlib.contextmanager
def _on_cpu(cpu: int | None) -> Iterator[None]:
    """This thread on one CPU, if one is given."""
    if cpu is None:
        yield
        return
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {cpu})
    except OSError as error:
        raise LabError(f"CPU {cpu} cannot be used: {error.strerror}") from error
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@click.command()
@click.option(
    "-s", "--socket", "sockets", multiple=True, required=True, metavar="PATH",
    help="vhost-user socket of a port; give two.",
)  # fmt: skip
@click.option(
    "--size", type=click.IntRange(MIN_FRAME_LEN, MAX_FRAME_LEN), default=MIN_FRAME_LEN,
    show_default=True, metavar="BYTES", help="Length of the frames, without check sequence.",
)  # fmt: skip
@click.option(
    "--seconds", type=click.FloatRange(min=0.01), default=3.0, show_default=True,
    help="How long to send.",
)  # fmt: skip
@click.option(
    "--window", type=click.IntRange(1, RING_SIZE_MAX), default=128, show_default=True,
    metavar="FRAMES", help="Most frames under way in a direction.",
)  # fmt: skip
@click.option("--packed", is_flag=True, help="Use packed virtqueues in place of split ones.")
@click.option("--both", is_flag=True, help="Send in both directions at once.")
@click.option("--cpu", type=click.IntRange(min=0), help="CPU to generate on; not the switch's.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def bench(
    sockets: tuple[str, ...],
    size: int,
    seconds: float,
    window: int,
    packed: bool,
    both: bool,
    cpu: int | None,
    as_json: bool,
) -> None:
    """Send frames through any vhost-user switch and print rate, loss and latency.

    Takes the place of two virtual machines on two ports, whose sockets the switch listens on. The
    loop is closed: a frame follows for each that arrives, so the rate is what the switch can do.
    """
    if len(sockets) != 2:
        raise click.UsageError(f"{len(sockets)} sockets given, two are needed: -s A -s B")
    options = Options(frame_len=size, seconds=seconds, window=window, packed=packed, both=both)
    with _on_cpu(cpu):
        rates = measure(sockets, options)
    if as_json:
        click.echo(json.dumps(asdict(rates)))
        return
    click.echo(
        f"rate     {rates.frames_per_s / 1e6:.3f} million frames/s, "
        f"{rates.bits_per_s / 1e9:.2f} Gbit/s\n"
        f"loss     {rates.lost} of {rates.sent} frames\n"
        f"latency  median {rates.latency_median_us:.2f} µs, p99 {rates.latency_p99_us:.2f} µs "
        "(one frame under way)"
    )
