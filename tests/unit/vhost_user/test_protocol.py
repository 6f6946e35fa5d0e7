"""The vhost-user codec: round trips, and every way a message can have the wrong shape."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vswitch.vhost_user import protocol
from vswitch.vhost_user.protocol import (
    FLAG_NEED_REPLY,
    FLAG_REPLY,
    HEADER,
    MAX_FDS,
    MAX_PAYLOAD_LEN,
    REQUESTS,
    MalformedError,
    MemRegion,
    Payload,
    ProtocolFeature,
    Request,
    VringAddr,
    VringState,
)

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
regions = st.lists(st.builds(MemRegion, u64, u64, u64, u64), max_size=MAX_FDS)


@given(u32, st.sampled_from([0, FLAG_REPLY, FLAG_NEED_REPLY]), st.binary(max_size=300))
def test_what_is_encoded_decodes_to_itself(request_: int, flags: int, payload: bytes) -> None:
    message = protocol.encode(request_, payload, flags=flags)
    header = protocol.decode_header(message[: HEADER.size])
    assert (header.request, header.size, message[HEADER.size :]) == (
        request_,
        len(payload),
        payload,
    )
    assert header.is_reply == bool(flags & FLAG_REPLY)
    assert header.need_reply == bool(flags & FLAG_NEED_REPLY)


@given(u32, u32, regions, u64)
def test_payloads_round_trip(a: int, b: int, table: list[MemRegion], value: int) -> None:
    assert protocol.decode_u64(protocol.encode_u64(value)) == value
    state = VringState(a, b)
    assert protocol.decode_vring_state(protocol.encode_vring_state(state)) == state
    addr = VringAddr(a, b, value, value ^ 1, value ^ 2, value ^ 3)
    assert protocol.decode_vring_addr(protocol.encode_vring_addr(addr)) == addr
    assert protocol.decode_mem_table(protocol.encode_mem_table(table)) == table
    for region in table:
        assert protocol.decode_mem_region(protocol.encode_mem_region(region)) == region


def test_layout_is_that_of_the_document() -> None:
    """Written by hand from "Header", "Memory regions description" and "A vring state"."""
    table = protocol.encode(
        Request.SET_MEM_TABLE, protocol.encode_mem_table([MemRegion(0x1000, 0x2000, 0x7F00, 0x30)])
    )
    assert table.hex() == (
        "05000000"  # request
        "01000000"  # version 1, no flags
        "28000000"  # 40 bytes follow
        "0100000000000000"  # one region, padding
        "0010000000000000"  # guest address
        "0020000000000000"  # size
        "007f000000000000"  # user address
        "3000000000000000"  # mmap offset
    )
    base = protocol.encode(11, protocol.encode_vring_state(VringState(3, 0x102)), flags=FLAG_REPLY)
    assert base.hex() == "0b00000005000000080000000300000002010000"


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        (HEADER.pack(1, 0, 0), "carry version 0, not 1"),
        (HEADER.pack(1, 2, 0), "carry version 2, not 1"),
        (HEADER.pack(1, 1, MAX_PAYLOAD_LEN + 1), "size 4097 is more"),
        (HEADER.pack(77, 1, 2**32 - 1), "request 77: size 4294967295"),
    ],
)
def test_impossible_headers_are_named(header: bytes, complaint: str) -> None:
    with pytest.raises(MalformedError, match=complaint):
        protocol.decode_header(header)


@pytest.mark.parametrize("request_", list(REQUESTS))
def test_every_request_refuses_other_lengths_and_descriptor_counts(request_: Request) -> None:
    spec = REQUESTS[request_]
    low, high = protocol.PAYLOAD_SIZES[spec.payload]
    assert protocol.check_shape(request_, b"\0" * low, spec.min_fds) is spec
    wrong = [high + 1]
    if low:
        wrong.append(low - 1)
    for length in wrong:
        with pytest.raises(MalformedError, match=f"{request_.name}: size is {length}"):
            protocol.check_shape(request_, b"\0" * length, spec.min_fds)
    with pytest.raises(MalformedError, match=f"{spec.max_fds + 1} file descriptors came"):
        protocol.check_shape(request_, b"\0" * low, spec.max_fds + 1)


def test_a_memory_table_may_not_count_more_than_it_holds() -> None:
    payload = bytearray(protocol.encode_mem_table([MemRegion(0, 4096, 0, 0)]))
    payload[0] = 2
    with pytest.raises(MalformedError, match="2 regions do not fit in size 40"):
        protocol.decode_mem_table(bytes(payload))
    payload[0] = MAX_FDS + 1
    with pytest.raises(MalformedError, match="9 regions, the most is 8"):
        protocol.decode_mem_table(bytes(payload))


def test_requests_that_need_a_feature_say_which() -> None:
    assert REQUESTS[Request.SEND_RARP].needs is ProtocolFeature.RARP
    assert REQUESTS[Request.NET_SET_MTU].needs is ProtocolFeature.MTU
    assert REQUESTS[Request.GET_QUEUE_NUM].needs is ProtocolFeature.MQ
    assert all(spec.payload in Payload for spec in REQUESTS.values())
