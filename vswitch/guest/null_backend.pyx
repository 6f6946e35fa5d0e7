"""The other side of two rings without any switching: shows how fast the load generator itself is."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from vswitch.guest.flow cimport BURST, put
from vswitch.guest.split cimport (
    USED_F_NO_NOTIFY,
    SplitRing,
    UsedElem,
    guest_load_acquire_u16,
    guest_store_relaxed_u16,
    guest_store_release_u16,
    split_used_elem,
)


cdef extern from "barriers.h" nogil:
    int guest_load_relaxed_int(const int *p)
    void guest_store_relaxed_int(int *p, int value)
    void guest_pause()


cdef extern from "<sched.h>" nogil:
    int sched_yield()


cdef enum:
    YIELD_AFTER = 4096         # loops without work before the core is offered to others


cdef class NullBackend:
    """Moves chains from a transmitq to a receiveq without looking into any of them.

    Both belong to guests that are connected to nobody (SoftwareGuest.build_offline) and are polled
    by a Load in another thread. Every frame "arrives" with `frame_len` bytes, whatever was sent; a
    frame waits until there is a buffer for it.
    """

    def __init__(self, tx, rx, uint32_t frame_len):
        cdef uint32_t slot
        cdef uint8_t[12] header
        for slot in range(12):
            header[slot] = 0
        header[10] = 1
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

    def run(self):
        """Forward until `stop` is called. Polls all the time, without the GIL."""
        cdef SplitRing *tx = &self.tx.ring
        cdef SplitRing *rx = &self.rx.ring
        cdef uint16_t tx_idx, rx_idx, tx_avail, rx_avail, n, i
        cdef uint32_t idle = 0
        cdef uint32_t length = self.used_len
        cdef UsedElem *elem
        with nogil:
            guest_store_relaxed_u16(tx.used, USED_F_NO_NOTIFY)
            guest_store_relaxed_u16(rx.used, USED_F_NO_NOTIFY)
            tx_idx = tx.used[1]
            rx_idx = rx.used[1]
            rx_avail = rx_idx
            while not guest_load_relaxed_int(&self.stopping):
                # Acquire: pairs with the release store in split_publish.
                tx_avail = guest_load_acquire_u16(tx.avail + 1)
                n = <uint16_t>(tx_avail - tx_idx)
                if n > BURST:
                    n = BURST
                if <uint16_t>(rx_avail - rx_idx) < n:
                    rx_avail = guest_load_acquire_u16(rx.avail + 1)
                if <uint16_t>(rx_avail - rx_idx) < n:
                    n = <uint16_t>(rx_avail - rx_idx)
                if n == 0:
                    idle += 1
                    guest_pause()
                    if idle % YIELD_AFTER == 0:
                        sched_yield()
                    continue
                idle = 0
                for i in range(n):
                    elem = split_used_elem(tx, <uint16_t>(tx_idx + i))
                    elem.id = tx.avail[2 + (<uint16_t>(tx_idx + i) & (tx.size - 1))]
                    elem.len = 0
                    elem = split_used_elem(rx, <uint16_t>(rx_idx + i))
                    elem.id = rx.avail[2 + (<uint16_t>(rx_idx + i) & (rx.size - 1))]
                    elem.len = length
                tx_idx += n
                rx_idx += n
                # Release: pairs with the acquire load in split_more_used.
                guest_store_release_u16(rx.used + 1, rx_idx)
                guest_store_release_u16(tx.used + 1, tx_idx)
                self.forwarded += n
