"""A guest's second CPU that rewrites memory while the device reads it."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t


cdef extern from "barriers.h" nogil:
    void guest_store_relaxed_u16(uint16_t *p, uint16_t value)


def scribble(
    uint8_t[::1] memory not None,
    const uint32_t[::1] places not None,
    const uint16_t[::1] values not None,
    uint64_t seed,
    uint64_t count,
):
    """Store `count` of `values` at `places` (even offsets in `memory`), both chosen by `seed`.

    Every store is one of 16 bits. Runs without the GIL. IndexError for a place that is no even
    offset in memory, ValueError where there is nothing to choose from.
    """
    cdef uint64_t _i, state = seed | 1
    cdef uint64_t n_places = places.shape[0], n_values = values.shape[0]
    if n_places == 0 or n_values == 0:
        raise ValueError("no places or no values")
    for place in places:
        if place & 1 or place + 2 > memory.shape[0]:
            raise IndexError(f"offset {place} in {memory.shape[0]} bytes")
    with nogil:
        for _i in range(count):
            # xorshift64 (Marsaglia, 2003)
            state ^= state << 13
            state ^= state >> 7
            state ^= state << 17
            guest_store_relaxed_u16(
                <uint16_t *>&memory[places[(state >> 8) % n_places]],
                values[(state >> 40) % n_values],
            )
