"""The other side of two rings without any switching: shows how fast the load generator itself is."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from vswitch.lab.guest.packed cimport (
    DESCS_A_LINE,
    EVENT_FLAGS_DISABLE,
    packed_advance,
    packed_avail_bits,
    packed_used_bits,
)
from vswitch.lab.guest.split cimport (
    USED_A_LINE,
    USED_F_NO_NOTIFY,
    guest_load_acquire_u16,
    guest_store_relaxed_u16,
    guest_store_release_u16,
    split_used_elem,
)
from vswitch.lab.guest.vring cimport DESC_F_NEXT, DESC_F_WRITE, PackedDesc, Ring
from vswitch.lab.load.flow cimport BURST, put


cdef extern from "barriers.h" nogil:
    int guest_load_relaxed_int(const int *p)
    void guest_store_relaxed_int(int *p, int value)
    void guest_pause()
    void guest_prefetch_write(const void *p)


cdef extern from "<sched.h>" nogil:
    int sched_yield()


cdef enum:
    YIELD_AFTER = 4096         # loops without work before the core is offered to others


cdef inline bint entry_is_available(const Side *side, uint16_t at, uint16_t wrap) noexcept nogil:
    # Acquire: pairs with the release store in packed_publish.
    cdef uint16_t flags = guest_load_acquire_u16(&side.ring.packed_desc[at].flags)
    return flags & packed_used_bits(1) == packed_avail_bits(wrap)


cdef inline uint16_t available(Side *side, uint16_t wanted) noexcept nogil:
    """How many chains can be taken, `wanted` at most."""
    cdef uint16_t n, at = side.at, wrap = side.wrap
    if side.ring.packed:
        for n in range(wanted):
            if not entry_is_available(side, at, wrap):
                return n
            # What a chain has after its first entry is available with it.
            while side.ring.packed_desc[at].flags & DESC_F_NEXT:
                packed_advance(&side.ring, &at, &wrap, 1)
            packed_advance(&side.ring, &at, &wrap, 1)
        return wanted
    if <uint16_t>(side.avail_idx - side.at) < wanted:
        # Acquire: pairs with the release store in split_publish.
        side.avail_idx = guest_load_acquire_u16(side.ring.avail + 1)
    n = side.avail_idx - side.at
    return n if n < wanted else wanted


cdef inline void prefetch(Side *side, uint16_t n) noexcept nogil:
    """Ask for the lines that `use` will write: another core has read them."""
    cdef Ring *ring = &side.ring
    cdef uint32_t i = 0, at = side.at
    if not ring.packed:
        while i < <uint32_t>n + USED_A_LINE - 1:
            guest_prefetch_write(split_used_elem(ring, <uint16_t>(at + i)))
            i += USED_A_LINE
        return
    while i < <uint32_t>n + DESCS_A_LINE - 1:
        if at >= ring.size:
            at = 0
        guest_prefetch_write(ring.packed_desc + at)
        at += DESCS_A_LINE
        i += DESCS_A_LINE


cdef inline void use(Side *side, uint16_t n, uint32_t length) noexcept nogil:
    """Give `n` chains back, `length` bytes written into each."""
    cdef Ring *ring = &side.ring
    cdef uint64_t *elem  # id and length in one store
    cdef PackedDesc *first
    cdef uint16_t i, _i, flags
    if not ring.packed:
        for i in range(n):
            elem = <uint64_t *>split_used_elem(ring, <uint16_t>(side.at + i))
            elem[0] = (
                <uint64_t>length << 32
                | ring.avail[2 + (<uint16_t>(side.at + i) & (ring.size - 1))]
            )
        side.at += n
        # Release: pairs with the acquire load in split_more_used.
        guest_store_release_u16(ring.used + 1, side.at)
        return
    for _i in range(n):
        first = ring.packed_desc + side.at
        flags = packed_used_bits(side.wrap) | (DESC_F_WRITE if length else 0)
        while ring.packed_desc[side.at].flags & DESC_F_NEXT:
            packed_advance(ring, &side.at, &side.wrap, 1)
        first.id = ring.packed_desc[side.at].id
        first.len = length
        packed_advance(ring, &side.at, &side.wrap, 1)
        # Release: pairs with the acquire load in packed_is_used.
        guest_store_release_u16(&first.flags, flags)


cdef class NullBackend:
    """Moves chains from a transmitq to a receiveq without looking into any of them.

    Both belong to guests that are connected to nobody (SoftwareGuest.build_offline) and are polled
    by a Load in another thread. Every frame "arrives" with `frame_len` bytes, whatever was sent; a
    frame waits until there is a buffer for it. Each ring may be a split or a packed one.

    Nothing moves until `burst` frames (1 to 256) can, or until there were `patience` looks at fewer:
    the fewer times the two sides meet at the rings, the fewer cache lines go back and forth. With a
    patience of 0 whatever is there moves at once.
    """

    def __init__(self, tx, rx, uint32_t frame_len, *, uint16_t burst=BURST, uint32_t patience=0):
        cdef uint32_t slot
        cdef uint8_t[12] header
        for slot in range(12):
            header[slot] = 0
        header[10] = 1
        if not 1 <= burst <= 256:
            raise ValueError(f"bursts of {burst}, must be 1 to 256")
        self.burst = burst
        self.patience = patience
        self.tx = tx.ring
        self.rx = rx.ring
        self.used_len = self.rx.header_len + frame_len
        if self.used_len > self.rx.slot_len:
            raise ValueError(f"{self.rx.name}: buffers of {self.rx.slot_len} bytes are too small")
        # num_buffers is 1 once and for all: nobody changes the buffers.
        for slot in range(self.rx.slots):
            put(self.rx.slot_pieces(slot), 0, header, self.rx.header_len)
        self.stopping = 0

    def stop(self):
        """Make `run` return; for another thread."""
        guest_store_relaxed_int(&self.stopping, 1)

    cdef Side begin(self, Ring *ring) noexcept nogil:
        """Go on where the driver reaps next, and refuse notifications."""
        cdef Side side
        side.ring = ring[0]
        side.wrap = ring.used_wrap
        if ring.packed:
            side.at = side.avail_idx = ring.used_at
            guest_store_relaxed_u16(ring.used + 1, EVENT_FLAGS_DISABLE)
        else:
            side.at = side.avail_idx = ring.used[1]
            guest_store_relaxed_u16(ring.used, USED_F_NO_NOTIFY)
        return side

    def run(self):
        """Forward until `stop` is called. Polls all the time, without the GIL."""
        cdef Side tx, rx
        cdef uint16_t n
        cdef uint32_t idle = 0, waited = 0
        with nogil:
            tx = self.begin(&self.tx.ring)
            rx = self.begin(&self.rx.ring)
            while not guest_load_relaxed_int(&self.stopping):
                n = available(&tx, self.burst)
                if n:
                    n = available(&rx, n)
                if n and n < self.burst and waited < self.patience:
                    waited += 1
                    guest_pause()
                    continue
                waited = 0
                if n == 0:
                    idle += 1
                    guest_pause()
                    if idle % YIELD_AFTER == 0:
                        sched_yield()
                    continue
                idle = 0
                prefetch(&rx, n)
                prefetch(&tx, n)
                use(&rx, n, self.used_len)
                use(&tx, n, 0)
                self.forwarded += n
