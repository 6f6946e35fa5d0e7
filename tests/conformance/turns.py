"""How long the loops of a running switch took for a turn, as it says itself."""

from __future__ import annotations

from vswitch.control.client import Client

TURN_NS_MAX = 200_000_000
"""Eight times the longest that was seen in test_switch_turns.py on a loaded machine. To be found
are waits that last as long as somebody outside likes, and work that grows with what he sends."""


def longest_turns(client: Client) -> dict[str, int]:
    """Of the event loop and each worker since the start, as far as it is their own."""
    turns = client.event_loop()["turns"]
    assert turns is not None
    found = {"event loop": turns["since_start"]["own_ns"]}
    for worker in client.workers():
        found[f"worker {worker['id']}"] = worker["turns"]["since_start"]["own_ns"]
    return found
