"""Rings behind an IOMMU whose pages are neighbours for their driver only."""

from __future__ import annotations

from vswitch.lab.guest import SoftwareGuest
from vswitch.lab.guest.memory import PAGE_LEN
from vswitch.lab.guest.net_driver import AnyQueue
from vswitch.vhost_user.datapath import ring_areas


def pages_of(queue: AnyQueue) -> list[list[int]]:
    """The pages of each part of a ring: descriptors, the driver's, the device's."""
    one = queue.layout
    areas = ring_areas(queue.ring.packed, one.size, one.desc_gpa, one.avail_gpa, one.used_gpa)
    return [
        list(range(at - at % PAGE_LEN, at + length, PAGE_LEN)) for at, length in areas
    ]  # fmt: skip


def scatter(guest: SoftwareGuest, queue: AnyQueue, place: int) -> int:
    """Give every page of a ring other memory, every second one from `place` on, last page first.

    Returns the address behind what was taken; the switch knows of all of it by then.
    """
    pages = sorted({page for part in pages_of(queue) for page in part}, reverse=True)
    return move(guest, pages, place)


def move(guest: SoftwareGuest, pages: list[int], place: int) -> int:
    """The same with some pages."""
    for page in pages:
        since = len(guest.iommu.misses)
        guest.iommu.move(page, place)
        guest.iommu.wait_for_misses([page], since)
        place += 2 * PAGE_LEN
    return place
