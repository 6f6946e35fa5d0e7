"""Memory that cannot be, by every message that brings some; messages in an order that cannot be."""

from __future__ import annotations

import os

import pytest

from tests.conformance.test_switch_bad_messages import PAGE, UVA, Bench, eventfds, memory
from tests.support.frames import mac
from tests.support.running import Wire, teach
from vswitch.vhost_user.protocol import (
    Inflight,
    LogArea,
    MemRegion,
    Request,
    VringAddr,
    encode_inflight,
    encode_log,
    encode_mem_region,
    encode_mem_table,
    encode_u64,
)

TOP = (1 << 64) - PAGE
TIB = 1 << 40


@pytest.fixture
def bench(wire: Wire) -> Bench:
    return Bench(wire)


@pytest.mark.parametrize("request_", [Request.SET_MEM_TABLE, Request.ADD_MEM_REG])
def test_regions(bench: Bench, request_: Request) -> None:
    for region, reason in (
        (MemRegion(0, 0, UVA, 0), "size is 0"),
        (MemRegion(0, PAGE + 1, UVA, 0), "beyond the end of its file"),
        (MemRegion(0, PAGE, UVA, 1), "beyond the end of its file"),
        (MemRegion(0, 1 << 39, UVA, 0), "beyond the end of its file"),
        (MemRegion(TOP, 2 * PAGE, UVA, 0), "wraps past 2^64"),
        (MemRegion(0, 2 * PAGE, TOP, 0), "wraps past 2^64"),
        (MemRegion(0, PAGE, UVA, TOP + 1), "wraps past 2^64"),
        (MemRegion(0, (1 << 64) - 1, 0, 0), "1.0 TiB"),
    ):
        with memory() as fd:
            frontend = bench.connect()
            one = request_ is Request.ADD_MEM_REG
            payload = encode_mem_region(region) if one else encode_mem_table([region])
            frontend.send(request_, payload, [fd])
            bench.ended(frontend, f"{request_.name}: ")
            assert reason in str(bench.wire.info("bad")["error"])


def test_regions_on_top_of_each_other(bench: Bench) -> None:
    for second in (
        MemRegion(0, PAGE, UVA + PAGE, 0),
        MemRegion(PAGE - 1, PAGE, UVA + PAGE, 0),
        MemRegion(PAGE, PAGE, UVA, 0),
        MemRegion(PAGE, PAGE, UVA + PAGE - 1, 0),
    ):
        with memory() as fd:
            frontend = bench.connect()
            for region in (MemRegion(0, PAGE, UVA, 0), second):
                frontend.send(Request.ADD_MEM_REG, encode_mem_region(region), [fd])
            bench.ended(frontend, "ADD_MEM_REG: region 1: ")


def test_more_regions_than_slots(bench: Bench) -> None:
    with memory() as fd:
        frontend = bench.connect()
        for i in range(65):
            region = MemRegion(i * PAGE, PAGE, UVA + i * PAGE, 0)
            frontend.send(Request.ADD_MEM_REG, encode_mem_region(region), [fd])
        bench.ended(frontend, "ADD_MEM_REG: all 64 memory slots are in use")


@pytest.mark.parametrize("request_", [Request.SET_MEM_TABLE, Request.ADD_MEM_REG])
def test_nobody_takes_all_of_the_address_space(bench: Bench, request_: Request) -> None:
    """A file without contents is as large as its owner likes; others want to be mapped, too."""
    fd = os.memfd_create("bad")
    try:
        os.ftruncate(fd, 8 * TIB)
        regions = [MemRegion(i * TIB, TIB // 4, i * TIB, 0) for i in range(5)]
        frontend = bench.connect()
        if request_ is Request.SET_MEM_TABLE:
            frontend.send(request_, encode_mem_table(regions), [fd] * len(regions))
        else:
            for region in regions:
                frontend.send(request_, encode_mem_region(region), [fd])
        bench.ended(frontend, f"{request_.name}: the guest's memory is 1.2 TiB in all")
        # What is within the bound is mapped.
        frontend = bench.connect()
        frontend.send(Request.SET_MEM_TABLE, encode_mem_table(regions[:4]), [fd] * 4)
        frontend.sync()
        teach(bench.wire.guest("c", 3), bench.wire.guest("d", 4))
        assert mac(3) in bench.wire.learned()
        frontend.close()
    finally:
        os.close(fd)


def test_a_log_takes_little_of_it_either(bench: Bench) -> None:
    fd = os.memfd_create("bad")
    try:
        os.ftruncate(fd, 8 * TIB)
        frontend = bench.connect()
        frontend.send(Request.SET_LOG_BASE, encode_log(LogArea(8 * TIB, 0)), [fd])
        bench.ended(frontend, "SET_LOG_BASE: the log has 8796093022208 bytes, more than")
    finally:
        os.close(fd)


def test_logs_and_journals(bench: Bench) -> None:
    log, journal = Request.SET_LOG_BASE, Request.SET_INFLIGHT_FD
    for request, payload, reason in (
        (log, encode_log(LogArea(0, 0)), "the log's size is 0"),
        (log, encode_log(LogArea(PAGE + 1, 0)), "beyond the end of its file"),
        (log, encode_log(LogArea(PAGE, PAGE)), "beyond the end of its file"),
        (log, encode_log(LogArea((1 << 64) - 1, 1)), "the log has 18446744073709551615 bytes"),
        (log, encode_log(LogArea(1, (1 << 64) - 1)), "beyond the end of its file"),
        (journal, encode_inflight(Inflight(0, 0, 2, 256)), "mmap size 0"),
        (journal, encode_inflight(Inflight(PAGE, 0, 2, 256)), "mmap size 4096"),
        (journal, encode_inflight(Inflight((1 << 64) - 1, 1, 65535, 65535)), "mmap offset 1"),
    ):
        with memory() as fd:
            frontend = bench.connect()
            frontend.send(request, payload, [fd])
            bench.ended(frontend, f"{request.name}: ")
            assert reason in str(bench.wire.info("bad")["error"])


def test_messages_in_an_order_that_cannot_be(bench: Bench) -> None:
    """Rings enabled and kicked before they are anywhere, addresses before the memory, then it."""
    size = 8 * PAGE
    addr = VringAddr(0, 0, desc_uva=UVA, used_uva=UVA + 8192, avail_uva=UVA + 16384, log_gpa=0)
    frontend = bench.connect()
    frontend.set_vring_enable(0, True)
    with eventfds(2) as fds:
        frontend.send(Request.SET_VRING_KICK, encode_u64(0), fds[:1])
        frontend.send(Request.SET_VRING_CALL, encode_u64(0), fds[1:])
    frontend.set_vring_addr(addr)
    frontend.set_vring_addr(addr._replace(desc_uva=0))
    frontend.set_vring_num(0, 256)
    frontend.sync()
    bench.others_forward()
    assert bench.wire.info("bad")["state"] == "connected"
    # Now there is memory, and the ring, complete, is outside of it.
    with memory(size) as fd:
        table = encode_mem_table([MemRegion(0, size, UVA, 0)])
        frontend.send(Request.SET_MEM_TABLE, table, [fd])
    bench.ended(frontend, "SET_MEM_TABLE: vring 0: ")
