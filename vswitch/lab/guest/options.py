"""What a software guest can be told, by subject; what it wants of its backend is one of them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Self

from vswitch.lab.guest.shapes import BufferOptions
from vswitch.vhost_user.protocol import Feature, ProtocolFeature

DEFAULT_FEATURES = (
    Feature.VERSION_1
    | Feature.MRG_RXBUF
    | Feature.RING_INDIRECT_DESC
    | Feature.RING_EVENT_IDX
    | Feature.ANY_LAYOUT
    | Feature.PROTOCOL_FEATURES
)
DEFAULT_PROTOCOL_FEATURES = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.MTU
    | ProtocolFeature.RARP
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
)
_INBAND = (
    ProtocolFeature.INBAND_NOTIFICATIONS | ProtocolFeature.BACKEND_REQ | ProtocolFeature.REPLY_ACK
)
_IOMMU = ProtocolFeature.BACKEND_REQ | ProtocolFeature.REPLY_ACK


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What to negotiate: all of it that is offered."""

    features: int = DEFAULT_FEATURES
    required_features: int = 0
    """GuestError at connect if one of these is not offered."""
    protocol_features: int = DEFAULT_PROTOCOL_FEATURES
    inband: bool = False
    """Where INBAND_NOTIFICATIONS is negotiated, kick and be called by messages."""
    mtu: int | None = None
    """Told to the backend where MTU is negotiated as a protocol feature; bytes."""

    def in_full(self, queue_pairs: int, iommu: bool) -> Self:
        """With all that several queue pairs, an IOMMU and notifications by messages take."""
        protocol_features = self.protocol_features
        features, required = self.features, self.required_features
        if queue_pairs > 1:
            features |= Feature.MQ
        if self.inband:
            protocol_features |= _INBAND
        if iommu:
            protocol_features |= _IOMMU
            features |= Feature.ACCESS_PLATFORM
            required |= Feature.ACCESS_PLATFORM
        return replace(
            self,
            features=features,
            required_features=required,
            protocol_features=protocol_features,
        )


_SUBJECTS = {"wanted": Wanted, "buffers": BufferOptions}


def by_subject(**options: Any) -> dict[str, Any]:
    """Arguments of SoftwareGuest, for who has them in one list: fields of its subjects as well."""
    arguments: dict[str, Any] = {}
    for argument, subject in _SUBJECTS.items():
        names = [field.name for field in fields(subject) if field.name in options]
        arguments[argument] = subject(**{name: options.pop(name) for name in names})
    return arguments | options
