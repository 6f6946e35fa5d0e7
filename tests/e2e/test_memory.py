"""Guest memory in huge pages; memfd and /dev/shm are what the other tests' guests have."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.testbed import Kind, Testbed
from tests.e2e.transfer import Transfer


def test_guests_in_huge_pages(testbed: Testbed, hugetlbfs: Path) -> None:
    in_a_file = {"memory_backend": "hugetlbfs", "hugetlbfs": hugetlbfs}
    in_a_memfd = {"memory_backend": "hugetlb"}
    [vm1] = testbed.require("vm1")
    with testbed.kinds(vm2=Kind(in_a_file), vm3=Kind(in_a_memfd)) as (vm2, vm3):
        for guest in (vm2, vm3):
            assert page_sizes(testbed, guest.pid) == {2048}
        Transfer(vm2, vm3, 10_000_000).finish()
        Transfer(vm3, vm1, 10_000_000).finish()


def page_sizes(testbed: Testbed, qemu: int) -> set[int]:
    """KiB of the pages of the guest memory that a QEMU and the switch have both mapped."""
    guest = {inode for inode, _ in shared_mappings(qemu)}
    return {size for inode, size in shared_mappings(testbed.switch.pid) if inode in guest}


def shared_mappings(pid: int) -> list[tuple[str, int]]:
    """Device and inode, and size of the pages, of a process' shared mappings of 16 MiB or more."""
    found = []
    device_inode, large = "", False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            start, end = (int(address, 16) for address in words[0].split("-"))
            large = words[1][3] == "s" and end - start >= 16 << 20
            device_inode = f"{words[3]} {words[4]}"
        elif words[0] == "KernelPageSize:" and large:
            found.append((device_inode, int(words[1])))
    return found
