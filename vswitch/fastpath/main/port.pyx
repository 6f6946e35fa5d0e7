"""Ports as the main thread sees them; workers see the C structure inside."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free

from vswitch.fastpath.main.journal cimport Journal
from vswitch.fastpath.main.network cimport Network
from vswitch.fastpath.shared.port cimport (
    INGRESS_CABLE,
    INGRESS_HUB,
    INGRESS_STORM,
    KIND_TAP,
    KIND_VHOST,
    N_STORM,
    PortC,
)
from vswitch.fastpath.shared.sizes cimport MAX_PORTS, MAX_QUEUE_PAIRS, MAX_WIRE_LEN
from vswitch.fastpath.shared.virtio cimport OFFLOAD_CSUM, OFFLOAD_VALID
from vswitch.fastpath.sys.atomics cimport vs_load8, vs_load32, vs_store8, vs_store32, vs_store64

cdef extern from "<stdlib.h>" nogil:
    void *aligned_alloc(size_t alignment, size_t size)

cdef extern from "<string.h>" nogil:
    void *memset(void *s, int c, size_t n)

MAX_VRINGS = 2 * MAX_QUEUE_PAIRS
"""The most virtqueues of a port."""


cdef class Port:
    """A port of the fast path. Made by Engine.add_port, which gives it its number."""

    def __cinit__(self, str name, int number, bint tap, int tap_fd=-1):
        if not 0 <= number < MAX_PORTS:
            raise ValueError(f"port number {number} is not below {MAX_PORTS}")
        self.c = <PortC *>aligned_alloc(64, (sizeof(PortC) + 63) // 64 * 64)
        if self.c == NULL:
            raise MemoryError
        memset(self.c, 0, sizeof(PortC))
        self.name = name
        self.rings = {}
        self.c.id = number
        self.c.kind = KIND_TAP if tap else KIND_VHOST
        self.c.tap_fd = tap_fd
        self.c.max_len = MAX_WIRE_LEN
        self.journal = Journal(2 * MAX_QUEUE_PAIRS)

    # Where its frames go: changed before workers see the port, or while it is paused and they do not.

    def join(self, Network network not None):
        """Be a port of a network, and of no other, nor the end of a cable."""
        self.peer = None
        self.network = network
        self.c.fdb = network.fdb.c
        self._stage(INGRESS_CABLE, False)
        self._stage(INGRESS_HUB, not network.learning)
        for ring in self.rings.values():
            ring.forget_flows()

    def connect(self, Port peer):
        """Be the end of a cable whose other end is `peer`; None: nobody is there."""
        self.network = None
        self.peer = peer
        self._stage(INGRESS_HUB, False)
        self._stage(INGRESS_CABLE, True)

    cdef int _stage(self, uint8_t stage, bint on) except -1:
        vs_store8(&self.c.ingress, self.c.ingress & ~stage | (stage if on else 0))
        return 0

    def use_journal(self, Journal journal not None):
        """Have rings that start from now on make their notes there."""
        if journal.size < 2 * MAX_QUEUE_PAIRS:
            raise ValueError(f"a journal of {journal.size} rings; {2 * MAX_QUEUE_PAIRS} may be needed")
        for ring in self.rings.values():
            ring.use_journal(journal)
        self.journal = journal

    def __dealloc__(self):
        free(self.c)

    @property
    def id(self):
        return self.c.id

    @property
    def is_tap(self):
        return self.c.kind == KIND_TAP

    @property
    def link_down(self):
        """Switched off by the user: what its guest sends is counted as dropped for that."""
        return bool(self.c.link_down)

    @link_down.setter
    def link_down(self, bint value):
        vs_store8(&self.c.link_down, value)

    @property
    def offloads(self):
        """OFFLOAD_* (the values of TUN_F_*) that a TAP takes and asks for; set before it is shown."""
        return self.c.offloads & ~OFFLOAD_VALID

    @offloads.setter
    def offloads(self, uint8_t value):
        self.c.offloads = value | OFFLOAD_VALID if value & OFFLOAD_CSUM else 0

    def set_storm(self, rates, burst=None):
        """Limit what is flooded: frames a second of broadcast, multicast and unknown unicast.

        None is no limit. `burst` is how many frames a bucket holds, by default those of a tenth of
        a second, 64 at least.
        """
        cdef uint64_t period
        for kind, rate in zip(range(N_STORM), rates, strict=True):
            # A limit that is being replaced may let a burst more through, no frame too few.
            period = 0 if rate is None else max(1, 1_000_000_000 // rate)
            vs_store64(&self.c.storm_period_ns[kind], 0)
            if period:
                vs_store64(
                    &self.c.storm_burst_ns[kind], period * (burst or max(64, rate // 10))
                )
                vs_store64(&self.c.storm_full_ns[kind], 0)
                vs_store64(&self.c.storm_period_ns[kind], period)
        self._stage(INGRESS_STORM, any(rate is not None for rate in rates))

    @property
    def mac_limit_told(self):
        """Whether "mac-limit" was reported; no further one is until this is set to False."""
        return bool(vs_load8(&self.c.mac_limit_told))

    @mac_limit_told.setter
    def mac_limit_told(self, bint value):
        vs_store8(&self.c.mac_limit_told, value)

    @property
    def max_len(self):
        """Longest Ethernet frame taken or given, in bytes without FCS.

        The second of two VLAN tags is not counted, as Linux does not count it: 18 bytes more than an
        MTU let both through.
        """
        return vs_load32(&self.c.max_len)

    @max_len.setter
    def max_len(self, uint32_t value):
        vs_store32(&self.c.max_len, min(value, <uint32_t>MAX_WIRE_LEN))
