"""The parts of a ring: how long each of them is, and where it lies."""

from libc.stdint cimport uint32_t, uint64_t

from vswitch.fastpath.main.joined cimport RingPlace
from vswitch.fastpath.main.mapping cimport Memory
from vswitch.fastpath.shared.memory cimport uva_to_host
from vswitch.fastpath.shared.sizes cimport MAX_RING_SIZE


class RingError(ValueError):
    """A ring cannot be started; the text names the field and the value."""


cdef tuple ring_parts(
    unsigned int size, uint64_t desc_uva, uint64_t used_uva, uint64_t avail_uva, uint32_t base,
    bint packed,
):
    """(name, address, alignment, bytes) of each part of a ring; RingError if it cannot be such a ring."""
    if packed:
        if not 1 <= size <= MAX_RING_SIZE:
            raise RingError(f"size {size} is not between 1 and {MAX_RING_SIZE}")
        if base & 0x7FFF >= size:
            raise RingError(f"base {base:#x} is a position beyond the ring's {size} entries")
        # 2.8.10.1: the two event suppression structures, where a split ring has its other parts.
        return (
            ("descriptor ring", desc_uva, 16, 16 * size),
            ("driver event suppression", avail_uva, 4, 4),
            ("device event suppression", used_uva, 4, 4),
        )
    if size == 0 or size > MAX_RING_SIZE or size & (size - 1):
        raise RingError(f"size {size} is not a power of two from 1 to {MAX_RING_SIZE}")
    return (
        ("descriptor table", desc_uva, 16, 16 * size),
        ("avail ring", avail_uva, 2, 6 + 2 * size),
        ("used ring", used_uva, 4, 6 + 8 * size),
    )


cdef RingPlace find_parts(char **hosts, Memory memory, unsigned int size, tuple parts, tuple pieces):
    """Find the first byte of each part, or map it; where they are if they are mapped anew, else None.

    `pieces` are as Ring.start has them. Raises RingError.
    """
    cdef RingPlace placed = None
    if pieces:
        if [sum([one for _, one in part]) for part in pieces] != [part[3] for part in parts]:
            raise RingError(f"the pieces of a ring of size {size} are not as long as its parts")
        try:
            placed = RingPlace(memory, pieces)
        except (ValueError, OSError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) else exc
            raise RingError(f"its parts cannot be mapped in one piece each: {reason}") from exc
    for i, (name, uva, align, length) in enumerate(parts):
        if uva % align:
            raise RingError(f"{name} address {uva:#x} is not aligned to {align} bytes")
        hosts[i] = placed.hosts[i] if pieces else uva_to_host(memory.table, uva, length)
        if hosts[i] == NULL:
            raise RingError(f"{name} address {uva:#x} (size {size}) is outside the guest memory")
        if <uint64_t>hosts[i] % align:
            raise RingError(
                f"{name} address {uva:#x} is not aligned to {align} bytes in its file: "
                "the region's mmap offset is odd"
            )
    return placed
