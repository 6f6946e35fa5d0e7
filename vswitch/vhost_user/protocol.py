"""vhost-user messages as bytes and as values, without any I/O.

Follows "Message Specification" and "Front-end message types" of QEMU's docs/interop/vhost-user.rst.
Frontend (the software guest) and backend (the switch) share this table: one row a request says what
payload it carries, how many file descriptors come with it, whether it has a reply of its own and
which protocol feature makes it legal.

All integers are in native byte order, as the protocol has them.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import NamedTuple

HEADER = struct.Struct("=III")
HEADER_LEN = HEADER.size

VERSION = 0x1
VERSION_MASK = 0x3
FLAG_REPLY = 1 << 2
FLAG_NEED_REPLY = 1 << 3

MAX_PAYLOAD_LEN = 4096
"""No message that we know is longer (SET_CONFIG is the longest with 12 + 256 bytes)."""
MAX_FDS = 8
"""VHOST_MEMORY_BASELINE_NREGIONS: the most regions, hence file descriptors, in one message."""

VRING_IDX_MASK = 0xFF
VRING_F_LOG = 1 << 0
"""Flag of SET_VRING_ADDR: writes to the used ring are to be logged."""

VRING_NOFD = 1 << 8
"""Set in a SET_VRING_KICK/CALL/ERR payload that comes without a file descriptor."""


class Request(enum.IntEnum):
    """Requests a frontend sends to the backend."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43


class BackendRequest(enum.IntEnum):
    """Requests a backend sends to the frontend ("Back-end message types")."""

    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_HOST_NOTIFIER_MSG = 3
    VRING_CALL = 4
    VRING_ERR = 5
    SHARED_OBJECT_ADD = 6
    SHARED_OBJECT_REMOVE = 7
    SHARED_OBJECT_LOOKUP = 8


class ProtocolFeature(enum.IntFlag):
    """VHOST_USER_PROTOCOL_F_*, as masks."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19


class Feature(enum.IntFlag):
    """Virtio feature bits (VIRTIO 1.2, 5.1.3 and 6) and vhost-user's own bit 30, as masks."""

    CSUM = 1 << 0
    GUEST_CSUM = 1 << 1
    CTRL_GUEST_OFFLOADS = 1 << 2
    MTU = 1 << 3
    MAC = 1 << 5
    GSO = 1 << 6
    GUEST_TSO4 = 1 << 7
    GUEST_TSO6 = 1 << 8
    GUEST_ECN = 1 << 9
    GUEST_UFO = 1 << 10
    HOST_TSO4 = 1 << 11
    HOST_TSO6 = 1 << 12
    HOST_ECN = 1 << 13
    HOST_UFO = 1 << 14
    MRG_RXBUF = 1 << 15
    STATUS = 1 << 16
    CTRL_VQ = 1 << 17
    CTRL_RX = 1 << 18
    CTRL_VLAN = 1 << 19
    CTRL_RX_EXTRA = 1 << 20
    GUEST_ANNOUNCE = 1 << 21
    MQ = 1 << 22
    CTRL_MAC_ADDR = 1 << 23
    NOTIFY_ON_EMPTY = 1 << 24
    LOG_ALL = 1 << 26
    ANY_LAYOUT = 1 << 27
    RING_INDIRECT_DESC = 1 << 28
    RING_EVENT_IDX = 1 << 29
    PROTOCOL_FEATURES = 1 << 30
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35
    ORDER_PLATFORM = 1 << 36
    NOTIFICATION_DATA = 1 << 38
    RING_RESET = 1 << 40
    GUEST_USO4 = 1 << 54
    GUEST_USO6 = 1 << 55
    HOST_USO = 1 << 56
    HASH_REPORT = 1 << 57
    GUEST_HDRLEN = 1 << 59
    RSS = 1 << 60


class Status(enum.IntFlag):
    """Device status bits (VIRTIO 1.2, section 2.1)."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    DEVICE_NEEDS_RESET = 64
    FAILED = 128


class Payload(enum.Enum):
    """The shapes a payload can have ("Payload" in the protocol document)."""

    NONE = enum.auto()
    U64 = enum.auto()
    VRING_STATE = enum.auto()
    VRING_ADDR = enum.auto()
    MEM_TABLE = enum.auto()
    MEM_REGION = enum.auto()
    LOG = enum.auto()
    IOTLB = enum.auto()
    CONFIG = enum.auto()
    INFLIGHT = enum.auto()
    DEVICE_STATE = enum.auto()


class VringState(NamedTuple):
    """A vring index and a number: ring size (entries), base (free-running index) or enable flag."""

    vring: int
    num: int


class VringAddr(NamedTuple):
    """Where a vring lies; ring addresses are in the frontend's own address space (`_uva`)."""

    vring: int
    flags: int
    desc_uva: int
    used_uva: int
    avail_uva: int
    log_gpa: int


class LogArea(NamedTuple):
    """Where the bitmap of written pages lies in its file; both are bytes."""

    size: int
    offset: int


class MemRegion(NamedTuple):
    """One piece of guest memory. `size` and `mmap_offset` are bytes."""

    gpa: int
    size: int
    uva: int
    mmap_offset: int


class Inflight(NamedTuple):
    """Shared memory for I/O in flight: its size and offset in bytes, and for which rings."""

    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int


class IotlbType(enum.IntEnum):
    """What an IOTLB message is about. vhost-user has no batches (5 and 6 of the kernel's vhost)."""

    MISS = 1
    UPDATE = 2
    INVALIDATE = 3
    ACCESS_FAIL = 4


class IotlbEntry(NamedTuple):
    """A mapping of I/O virtual addresses; `size` is bytes, `access` 1 for read and 2 for write."""

    iova: int
    size: int
    uva: int
    access: int
    type: IotlbType


_U64 = struct.Struct("=Q")
_STATE = struct.Struct("=II")
_ADDR = struct.Struct("=IIQQQQ")
_LOG = struct.Struct("=QQ")
_MEM_HEAD = struct.Struct("=II")
_REGION = struct.Struct("=QQQQ")
_SINGLE_REGION = struct.Struct("=QQQQQ")
_INFLIGHT = struct.Struct("=QQHH")
_IOTLB = struct.Struct("=QQQBB6x")

PAYLOAD_SIZES: dict[Payload, tuple[int, int]] = {
    Payload.NONE: (0, 0),
    Payload.U64: (8, 8),
    Payload.VRING_STATE: (8, 8),
    Payload.VRING_ADDR: (40, 40),
    Payload.MEM_TABLE: (8, 8 + 32 * MAX_FDS),
    Payload.MEM_REGION: (40, 40),
    Payload.LOG: (16, 16),
    Payload.IOTLB: (32, 32),
    Payload.CONFIG: (12, 12 + 256),
    # Padded to 24 bytes by QEMU and DPDK, packed by others.
    Payload.INFLIGHT: (20, 24),
    Payload.DEVICE_STATE: (8, 8),
}
"""Least and greatest length of each payload in bytes."""


class Reply(enum.Enum):
    """When a request is answered."""

    ACK = enum.auto()
    """Only when NEED_REPLY is set and REPLY_ACK was negotiated: a u64, zero for success."""
    ALWAYS = enum.auto()
    """The request has a reply payload of its own."""


@dataclass(frozen=True, slots=True)
class Spec:
    """One row of the message table: what a well-formed request looks like."""

    payload: Payload
    min_fds: int = 0
    max_fds: int = 0
    reply: Reply = Reply.ACK
    needs: ProtocolFeature | None = None


_F = ProtocolFeature

REQUESTS: dict[Request, Spec] = {
    Request.GET_FEATURES: Spec(Payload.NONE, reply=Reply.ALWAYS),
    Request.SET_FEATURES: Spec(Payload.U64),
    Request.SET_OWNER: Spec(Payload.NONE),
    Request.RESET_OWNER: Spec(Payload.NONE),
    Request.SET_MEM_TABLE: Spec(Payload.MEM_TABLE, max_fds=MAX_FDS),
    # Answered even where nobody asks for it, see Backend._set_log_base.
    Request.SET_LOG_BASE: Spec(Payload.LOG, 1, 1, needs=_F.LOG_SHMFD),
    Request.SET_LOG_FD: Spec(Payload.NONE, 1, 1, needs=_F.LOG_SHMFD),
    Request.SET_VRING_NUM: Spec(Payload.VRING_STATE),
    Request.SET_VRING_ADDR: Spec(Payload.VRING_ADDR),
    Request.SET_VRING_BASE: Spec(Payload.VRING_STATE),
    Request.GET_VRING_BASE: Spec(Payload.VRING_STATE, reply=Reply.ALWAYS),
    Request.SET_VRING_KICK: Spec(Payload.U64, max_fds=1),
    Request.SET_VRING_CALL: Spec(Payload.U64, max_fds=1),
    Request.SET_VRING_ERR: Spec(Payload.U64, max_fds=1),
    Request.GET_PROTOCOL_FEATURES: Spec(Payload.NONE, reply=Reply.ALWAYS),
    Request.SET_PROTOCOL_FEATURES: Spec(Payload.U64),
    Request.GET_QUEUE_NUM: Spec(Payload.NONE, reply=Reply.ALWAYS, needs=_F.MQ),
    Request.SET_VRING_ENABLE: Spec(Payload.VRING_STATE),
    Request.SEND_RARP: Spec(Payload.U64, needs=_F.RARP),
    Request.NET_SET_MTU: Spec(Payload.U64, needs=_F.MTU),
    Request.GET_INFLIGHT_FD: Spec(Payload.INFLIGHT, reply=Reply.ALWAYS, needs=_F.INFLIGHT_SHMFD),
    Request.SET_INFLIGHT_FD: Spec(Payload.INFLIGHT, min_fds=1, max_fds=1, needs=_F.INFLIGHT_SHMFD),
    Request.RESET_DEVICE: Spec(Payload.NONE, needs=_F.RESET_DEVICE),
    Request.GET_MAX_MEM_SLOTS: Spec(Payload.NONE, reply=Reply.ALWAYS, needs=_F.CONFIGURE_MEM_SLOTS),
    Request.ADD_MEM_REG: Spec(Payload.MEM_REGION, 1, 1, needs=_F.CONFIGURE_MEM_SLOTS),
    # Some frontends send a descriptor here, against the document, which allows to ignore it.
    Request.REM_MEM_REG: Spec(Payload.MEM_REGION, max_fds=1, needs=_F.CONFIGURE_MEM_SLOTS),
    Request.SET_STATUS: Spec(Payload.U64, needs=_F.STATUS),
    Request.GET_STATUS: Spec(Payload.NONE, reply=Reply.ALWAYS, needs=_F.STATUS),
    Request.SET_BACKEND_REQ_FD: Spec(Payload.NONE, 1, 1, needs=_F.BACKEND_REQ),
    Request.IOTLB_MSG: Spec(Payload.IOTLB),
    Request.VRING_KICK: Spec(Payload.VRING_STATE, needs=_F.INBAND_NOTIFICATIONS),
    Request.POSTCOPY_ADVISE: Spec(Payload.NONE, reply=Reply.ALWAYS, needs=_F.PAGEFAULT),
    Request.POSTCOPY_LISTEN: Spec(Payload.NONE, needs=_F.PAGEFAULT),
    Request.POSTCOPY_END: Spec(Payload.NONE, reply=Reply.ALWAYS, needs=_F.PAGEFAULT),
}
"""Every request the backend understands. What is missing here is refused as unsupported."""


class Header(NamedTuple):
    """The twelve bytes before each payload; `size` is the payload's length in bytes."""

    request: int
    flags: int
    size: int

    @property
    def need_reply(self) -> bool:
        return bool(self.flags & FLAG_NEED_REPLY)

    @property
    def is_reply(self) -> bool:
        return bool(self.flags & FLAG_REPLY)

    @property
    def version(self) -> int:
        return self.flags & VERSION_MASK


class MalformedError(ValueError):
    """A message that is not what the table says; the text names the field and the value."""


def request_name(number: int) -> str:
    """The name of a request for people, also of one that does not exist."""
    try:
        return Request(number).name
    except ValueError:
        return f"request {number}"


def decode_header(data: bytes) -> Header:
    """Take a header apart and check what can be checked before the payload is read.

    Raises MalformedError for a version other than 1 or a payload longer than MAX_PAYLOAD_LEN.
    """
    header = Header(*HEADER.unpack(data))
    name = request_name(header.request)
    if header.version != VERSION:
        raise MalformedError(
            f"{name}: flags {header.flags:#x} carry version {header.version}, not 1"
        )
    if header.size > MAX_PAYLOAD_LEN:
        raise MalformedError(
            f"{name}: size {header.size} is more than the {MAX_PAYLOAD_LEN} bytes of any message"
        )
    return header


def encode(request: int, payload: bytes = b"", *, flags: int = 0) -> bytes:
    """A whole message; `flags` are FLAG_REPLY and FLAG_NEED_REPLY, the version is added."""
    return HEADER.pack(request, flags | VERSION, len(payload)) + payload


def check_shape(request: Request, payload: bytes, n_fds: int) -> Spec:
    """Hold a message against its row in the table.

    Raises MalformedError when the payload's length or the number of file descriptors is wrong.
    """
    spec = REQUESTS[request]
    low, high = PAYLOAD_SIZES[spec.payload]
    if not low <= len(payload) <= high:
        want = str(low) if low == high else f"{low} to {high}"
        raise MalformedError(f"{request.name}: size is {len(payload)}, expected {want}")
    if not spec.min_fds <= n_fds <= spec.max_fds:
        raise MalformedError(
            f"{request.name}: {n_fds} file descriptors came with it, "
            f"expected {spec.min_fds} to {spec.max_fds}"
        )
    return spec


def encode_u64(value: int) -> bytes:
    return _U64.pack(value)


def decode_u64(payload: bytes) -> int:
    value: int = _U64.unpack(payload)[0]
    return value


def encode_vring_state(state: VringState) -> bytes:
    return _STATE.pack(*state)


def decode_vring_state(payload: bytes) -> VringState:
    return VringState(*_STATE.unpack(payload))


def encode_vring_addr(addr: VringAddr) -> bytes:
    return _ADDR.pack(*addr)


def decode_vring_addr(payload: bytes) -> VringAddr:
    return VringAddr(*_ADDR.unpack(payload))


def encode_mem_table(regions: list[MemRegion]) -> bytes:
    return _MEM_HEAD.pack(len(regions), 0) + b"".join(_REGION.pack(*r) for r in regions)


def decode_mem_table(payload: bytes) -> list[MemRegion]:
    """The regions of a SET_MEM_TABLE.

    Raises MalformedError when the count is above MAX_FDS or more than the payload holds. A payload
    with room for more regions than it counts is accepted: some frontends always send all eight.
    """
    count, _ = _MEM_HEAD.unpack_from(payload)
    if count > MAX_FDS:
        raise MalformedError(f"SET_MEM_TABLE: {count} regions, the most is {MAX_FDS}")
    if len(payload) < _MEM_HEAD.size + count * _REGION.size:
        raise MalformedError(f"SET_MEM_TABLE: {count} regions do not fit in size {len(payload)}")
    return [
        MemRegion(*_REGION.unpack_from(payload, _MEM_HEAD.size + i * _REGION.size))
        for i in range(count)
    ]


def encode_inflight(inflight: Inflight) -> bytes:
    return _INFLIGHT.pack(*inflight).ljust(24, b"\0")


def decode_inflight(payload: bytes) -> Inflight:
    return Inflight(*_INFLIGHT.unpack_from(payload))


def encode_log(area: LogArea) -> bytes:
    return _LOG.pack(*area)


def decode_log(payload: bytes) -> LogArea:
    return LogArea(*_LOG.unpack(payload))


def encode_mem_region(region: MemRegion) -> bytes:
    return _SINGLE_REGION.pack(0, *region)


def decode_mem_region(payload: bytes) -> MemRegion:
    return MemRegion(*_SINGLE_REGION.unpack(payload)[1:])


def encode_iotlb(entry: IotlbEntry) -> bytes:
    return _IOTLB.pack(*entry)


def decode_iotlb(payload: bytes) -> IotlbEntry:
    """An IOTLB message. Raises MalformedError for an unknown type or permission."""
    iova, size, uva, access, number = _IOTLB.unpack(payload)
    try:
        kind = IotlbType(number)
    except ValueError:
        raise MalformedError(f"IOTLB_MSG: type {number} is unknown") from None
    if kind is IotlbType.INVALIDATE:
        # These mean nothing here: QEMU leaves whatever was on its stack in them.
        uva = access = 0
    if access > 3:
        raise MalformedError(f"IOTLB_MSG: permissions {access:#x} have unknown bits")
    return IotlbEntry(iova, size, uva, access, kind)
