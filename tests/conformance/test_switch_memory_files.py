"""What files a guest's memory may be of, and what a frontend with many mappings costs."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.frames import mac
from tests.support.running import Wire, teach
from vswitch.lab.guest import Frontend, SoftwareGuest
from vswitch.vhost_user.protocol import (
    Feature,
    MemRegion,
    ProtocolFeature,
    Request,
    VringAddr,
    VringState,
    encode_mem_region,
    encode_mem_table,
    encode_u64,
    encode_vring_addr,
    encode_vring_state,
)

PAGE = 4096
LEN = 16 * PAGE
UVA = 0x7F00_0000_0000
DISK_GPA = 1 << 40
MAPPINGS = 60_000


@pytest.fixture
def on_disk() -> Iterator[int]:
    """A file that is on no file system of memory, nor its name."""
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as directory:
        fd = os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o600)
        os.ftruncate(fd, LEN)
        yield fd
        os.close(fd)


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, LEN)
    yield fd
    os.close(fd)


def negotiate(path: Path) -> Frontend:
    frontend = Frontend.connect(path, 10.0)
    frontend.negotiate(
        Feature.PROTOCOL_FEATURES | Feature.VERSION_1,
        ProtocolFeature.REPLY_ACK | ProtocolFeature.CONFIGURE_MEM_SLOTS,
    )
    return frontend


def start_ring(frontend: Frontend, uva: int) -> None:
    for request, payload in (
        (Request.SET_VRING_NUM, encode_vring_state(VringState(0, 16))),
        (Request.SET_VRING_BASE, encode_vring_state(VringState(0, 0))),
        (
            Request.SET_VRING_ADDR,
            encode_vring_addr(VringAddr(0, 0, uva, uva + 2 * PAGE, uva + PAGE, 0)),
        ),
    ):
        frontend.send(request, payload, [])
    kick = os.eventfd(0)
    frontend.send(Request.SET_VRING_KICK, encode_u64(0), [kick])
    os.close(kick)
    frontend.sync()


def test_a_region_on_a_disk_comes_with_the_table_and_harms_nothing(
    wire: Wire, on_disk: int, memfd: int
) -> None:
    """As QEMU hands over the file of an NVDIMM: what is in memory is used."""
    path = wire.port("a")
    with negotiate(path) as frontend:
        regions = [MemRegion(0, LEN, UVA, 0), MemRegion(DISK_GPA, LEN, UVA + LEN, 0)]
        frontend.send(Request.SET_MEM_TABLE, encode_mem_table(regions), [memfd, on_disk])
        start_ring(frontend, UVA)
        info = wire.info("a")
        assert info["error"] is None
        assert [region["gpa"] for region in info["memory"]] == [0]
        assert [ring["started"] for ring in info["rings"]] == [True]
        # It goes as it came, and comes alone as well.
        frontend.send(Request.REM_MEM_REG, encode_mem_region(regions[1]), [])
        frontend.send(Request.ADD_MEM_REG, encode_mem_region(regions[1]), [on_disk])
        frontend.sync()
        assert wire.info("a")["error"] is None


def test_a_ring_on_a_disk_is_a_fault_that_names_the_file_system(
    wire: Wire, on_disk: int, memfd: int
) -> None:
    path = wire.port("a")
    with negotiate(path) as frontend:
        regions = [MemRegion(0, LEN, UVA, 0), MemRegion(DISK_GPA, LEN, UVA + LEN, 0)]
        frontend.send(Request.SET_MEM_TABLE, encode_mem_table(regions), [memfd, on_disk])
        start_ring(frontend, UVA + LEN)
        wire.wait_state("a", "fault")
        error = str(wire.info("a")["error"])
        assert f"receiveq0: its address {UVA + LEN:#x} is in the guest's memory at" in error
        assert "which is a file on " in error
        assert "tmpfs or hugetlbfs" in error
        # Elsewhere it runs.
        frontend.get_vring_base(0)
        start_ring(frontend, UVA)
        info = wire.info("a")
        assert [ring["started"] for ring in info["rings"]] == [True]
        assert (info["state"], info["error"]) == ("connected", None)


def test_many_mappings_and_many_ring_starts(wire: Wire, memfd: int) -> None:
    """The frontend's list of mappings is read once a memory table, and by nobody whom others need.

    This process is the frontend: it has 60,000 of them in front of the one that is looked for.
    """
    b, c = wire.guest("b", 2), wire.guest("c", 3)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
    ]  # fmt: skip
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    size = MAPPINGS * PAGE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    base = libc.mmap(None, size, mmap.PROT_READ, flags, -1, 0)
    try:
        for page in range(0, MAPPINGS, 2):
            # Every second with other rights: a mapping of its own each.
            assert libc.mprotect(ctypes.c_void_p(base + page * PAGE), PAGE, 0) == 0
        with negotiate(wire.port("a")) as frontend:
            table = encode_mem_table([MemRegion(0, LEN, UVA, 0)])
            for _ in range(3):
                frontend.send(Request.SET_MEM_TABLE, table, [memfd])
                for _ in range(30):
                    start_ring(frontend, UVA)
                teach(b, c)
                wire.client.ping()
            info = wire.info("a")
            assert [ring["started"] for ring in info["rings"]] == [True]
            assert info["warning"] is None
    finally:
        libc.munmap(base, size)


def test_a_private_copy_is_warned_of(wire: Wire) -> None:
    """Some time after its rings have started: they do not wait for that."""
    fd = os.memfd_create("guest")
    os.ftruncate(fd, LEN)
    with mmap.mmap(fd, LEN, flags=mmap.MAP_PRIVATE) as memory:
        uva = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        with negotiate(wire.port("a")) as frontend:
            frontend.send(
                Request.SET_MEM_TABLE, encode_mem_table([MemRegion(0, LEN, uva, 0)]), [fd]
            )
            start_ring(frontend, uva)
            wire.wait_until(
                lambda: "not shared with the switch" in str(wire.info("a")["warning"]), "a warning"
            )
    os.close(fd)


def test_an_honest_guest_is_not_warned_of(wire: Wire) -> None:
    with SoftwareGuest(mac(1)) as guest:
        guest.connect(wire.port("a"))
        wire.wait_state("a", "ready")
        assert wire.info("a")["warning"] is None
