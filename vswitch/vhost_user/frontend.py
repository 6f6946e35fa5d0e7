"""What a port needs of its present frontend: the interface between forwarding and protocol.

`datapath.py` is the other direction. A `Backend` is one of these for as long as it is connected.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Protocol

from vswitch.relay.link import Link
from vswitch.vhost_user.protocol import Feature, ProtocolFeature, Request


class Frontend(Protocol):
    """A frontend as its port knows it: what it is, what it said, and how it is told."""

    @property
    def peer_pid(self) -> int | None:
        """Its process; None if the kernel does not say."""
        ...

    @property
    def link(self) -> Link:
        """Its connection in the relay."""
        ...

    @property
    def features(self) -> Feature:
        """Virtio features that it negotiated."""
        ...

    @property
    def protocol_features(self) -> ProtocolFeature:
        """Those of vhost-user."""
        ...

    @property
    def asked(self) -> Collection[Request]:
        """What it has ever sent."""
        ...

    @property
    def refused(self) -> Mapping[str, str]:
        """Requests by name that were refused and have not succeeded since, and why."""
        ...

    @property
    def has_run(self) -> bool:
        """Whether a ring has ever started."""
        ...

    @property
    def has_placed(self) -> bool:
        """Whether it has said of any ring where that is (SET_VRING_ADDR)."""
        ...

    @property
    def silent_s(self) -> float:
        """For how long it has sent nothing, in seconds."""
        ...

    def signal_error(self, index: int) -> None:
        """Tell it that a virtqueue is broken (SET_VRING_ERR, BACKEND_VRING_ERR)."""
        ...

    def ask_translation(self, iova: int, access: int, answered: Callable[[int], None]) -> bool:
        """Send an IOTLB miss; False if there is no way to.

        `answered` gets its status, 0 for success, which comes after its update, if it sends one.
        With a frontend without REPLY_ACK it is never called.
        """
        ...
