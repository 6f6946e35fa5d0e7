"""Rings as the main thread sees them; workers see the C structure inside."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free

from vswitch.fastpath.main.parts import RingError
from vswitch.fastpath.shared.words import RING_FAULTS

from vswitch.fastpath.main.ahead cimport untranslated
from vswitch.fastpath.main.iotlb cimport IotlbTables
from vswitch.fastpath.main.joined cimport RingPlace
from vswitch.fastpath.main.journal cimport Journal, recover_packed, recover_split
from vswitch.fastpath.main.mapping cimport DirtyLog, Memory
from vswitch.fastpath.main.parts cimport find_parts, ring_parts
from vswitch.fastpath.main.port cimport Port
from vswitch.fastpath.ring.dispatch cimport has_work, refuse_kicks, want_kicks
from vswitch.fastpath.ring.notes cimport note_batch, note_taken
from vswitch.fastpath.shared.dirty cimport log_packed, log_used
from vswitch.fastpath.shared.layout cimport check_layout
from vswitch.fastpath.shared.memory cimport uva_to_host
from vswitch.fastpath.shared.ring cimport LAST_NONE, LogC, RingC
from vswitch.fastpath.shared.sizes cimport BURST, MAX_QUEUE_PAIRS
from vswitch.fastpath.shared.virtio cimport OFFLOAD_CSUM, OFFLOAD_VALID, VringDesc, VringUsedElem
from vswitch.fastpath.shared.words cimport FAULT_IOTLB_MISS, FAULT_NONE
from vswitch.fastpath.sys.atomics cimport (
    vs_fence,
    vs_load16,
    vs_load32,
    vs_load64,
    vs_load_acquire16,
    vs_load_acquire32,
    vs_store8,
    vs_store32,
    vs_store_int,
    vs_store_release_ptr,
)
from vswitch.fastpath.worker.fdb cimport FDB_EMPTY

cdef extern from "<stdlib.h>" nogil:
    void *aligned_alloc(size_t alignment, size_t size)

cdef extern from "<string.h>" nogil:
    void *memset(void *s, int c, size_t n)

check_layout()


cdef LogC EMPTY_LOG
EMPTY_LOG.bits = NULL
EMPTY_LOG.len = 0


cdef class Ring:
    """One virtqueue of a port: even indices are receiveqs, odd ones transmitqs (5.1.2).

    Made stopped. `start` fills it in, Engine.publish then shows it to the workers. Changing a
    started ring, other than through methods that say so, takes `unpublish`, Engine.publish and a wait
    for quiescence first, and `mark_stopped`.
    """

    def __cinit__(self, Port port, int index):
        if not 0 <= index < 2 * MAX_QUEUE_PAIRS:
            raise ValueError(f"vring index {index} is not below {2 * MAX_QUEUE_PAIRS}")
        self.c = <RingC *>aligned_alloc(64, (sizeof(RingC) + 63) // 64 * 64)
        if self.c == NULL:
            raise MemoryError
        memset(self.c, 0, sizeof(RingC))
        self.port = port
        self.c.port = port.c
        self.c.index = index
        self.journal = port.journal
        self.c.journal = self.journal.slot(index)
        self.c.call_fd = -1
        self.c.src_generation = 0
        self.kick_fd = -1
        self.worker = -1
        port.rings[index] = self

    def __dealloc__(self):
        free(self.c)

    def start(
        self, Memory memory, unsigned int size, uint64_t desc_uva, uint64_t used_uva,
        uint64_t avail_uva, *, int hdr_len, bint event_idx, bint indirect, bint mergeable,
        uint32_t base, bint poll_only, bint packed=False, uint64_t identity=0,
        uint8_t offloads=0, IotlbTables iotlb=None, tuple pieces=(),
    ):
        """Point a stopped ring at its memory.

        `size` counts entries; addresses are the frontend's; `hdr_len` is the virtio_net_hdr in
        bytes; `base` is where to go on (SET_VRING_BASE), for a packed ring the position in bits 0
        to 14 and its wrap counter in bit 15. Where a split ring's used ring disagrees with `base`,
        as after a crash of the last backend, the used ring is right: every buffer taken before that
        and not given back is taken again, none is lost to the driver.
        `identity` is the same for the same ring in the same memory, 0 if unknown: with it the
        port's journal tells a packed ring's place and which frames were on their way.
        `offloads` has the OFFLOAD_* that a receiveq's driver takes, or a transmitq's may ask for.
        With `iotlb`, addresses of buffers are I/O virtual and translated by it; the ring's own
        addresses are the frontend's all the same. `pieces` says for each part (descriptors, the
        driver's, the device's) where it lies, as (address, size) of what is to be mapped side by
        side; empty when each is in one piece at its address.
        Returns where it goes on, as `base` would have it. Raises RingError.
        """
        cdef RingC *c = self.c
        if self.started:
            raise RingError("the ring is running already")
        parts = ring_parts(size, desc_uva, used_uva, avail_uva, base, packed)
        self._lie(memory, size, parts, pieces)
        c.mem = memory.table if iotlb is None else iotlb.for_ring(not self.is_transmitq)
        c.size = size
        c.mask = size - 1
        c.hdr_len = hdr_len
        c.event_idx = event_idx
        c.indirect = indirect
        c.mergeable = mergeable
        c.poll_only = poll_only
        c.packed = packed
        # Whoever computes checksums itself may also be told that there is nothing to compute.
        c.offloads = offloads | OFFLOAD_VALID if offloads & OFFLOAD_CSUM else 0
        c.lock = 0
        self._go_on(base, identity)
        c.signalled_valid = 0
        c.region_hint = 0
        c.empty_polls = 0
        c.debt = 0
        c.quota = BURST
        c.src_key = c.dst_key = FDB_EMPTY  # no frame's
        c.src_generation = c.dst_generation = 0
        c.fault_value = 0
        c.fault_detail = 0
        vs_store32(&c.fault, FAULT_NONE)
        # Polling to begin with; a worker asks for kicks before it sleeps.
        refuse_kicks(c)
        if c.dirty_log != NULL:
            # What was given back of an earlier switch's, wherever that was.
            log_used(c, 0, 4 if packed else 6 + 8 * size)
            if packed:
                log_packed(c, 0, size)
        self.memory = memory
        self.iotlb = iotlb
        self.areas = pieces or tuple([((uva, length),) for _, uva, _, length in parts])
        self.started = self.published = True
        self.moving = False
        return self.base

    cdef int _lie(self, Memory memory, unsigned int size, tuple parts, tuple pieces) except -1:
        """Point to the parts of the ring; nothing has changed after a RingError."""
        cdef RingC *c = self.c
        cdef char *hosts[3]
        cdef RingPlace placed = find_parts(hosts, memory, size, parts, pieces)
        c.desc = <VringDesc *>hosts[0]
        c.avail = <uint16_t *>hosts[1]
        c.used_hdr = <uint16_t *>hosts[2]
        c.used = <VringUsedElem *>(c.used_hdr + 2)
        c.used_event = c.avail + 2 + size
        c.avail_event = c.used_hdr + 2 + 4 * size
        c.guest_mem = memory.table
        c.own_mem = memory.table if placed is None else placed.table
        self.place = placed
        return 0

    cdef int _go_on(self, uint32_t base, uint64_t identity) except -1:
        """Find where the ring goes on, and have the journal be about it from now on."""
        cdef RingC *c = self.c
        if c.packed:
            c.last_avail = c.last_used = base & 0x7FFF
            c.avail_wrap = c.used_wrap = base >> 15 & 1
        else:
            c.last_avail = c.last_used = vs_load_acquire16(c.used_hdr + 1)
        c.cached_avail = c.last_avail
        c.last_used_at = LAST_NONE
        if identity and c.journal.identity == identity:
            if c.packed:
                recover_packed(c, <uint16_t>base)
            elif self.is_transmitq:
                recover_split(c)
        c.journal.identity = 0
        note_taken(c)
        note_batch(c, c.last_avail, c.avail_wrap, NULL, 0)
        c.journal.told = <uint16_t>base
        c.journal.identity = identity
        c.published = c.last_used
        return 0

    def use_memory(self, Memory memory):
        """Translate buffers by another memory from now on, in which the ring lies where it lay.

        Returns the old one, which may be in use until quiescence. Raises RingError if the ring itself
        is elsewhere or nowhere in it, or has stopped; nothing has changed then.
        """
        cdef Memory old = self.memory
        if old is None:
            raise RingError("the ring has stopped")
        for part in self.areas:
            for uva, length in part:
                if (
                    uva_to_host(memory.table, uva, length)
                    != uva_to_host(old.table, uva, length)
                ):
                    raise RingError(f"the memory of the running ring at {uva:#x} would go")
        # Release: the table before the pointer to it; workers load the pointer once a translation.
        vs_store_release_ptr(<void **>&self.c.guest_mem, memory.table)
        if self.iotlb is None:
            vs_store_release_ptr(<void **>&self.c.mem, memory.table)
        if self.place is None:
            vs_store_release_ptr(<void **>&self.c.own_mem, memory.table)
        self.memory = memory
        return old

    def use_iotlb(self, IotlbTables iotlb not None):
        """Translate buffers by other tables of the same IOTLB from now on.

        Returns the old ones, which may be in use until quiescence. A ring that waits looks into the
        new ones.
        """
        old = self.iotlb
        # Release: as in use_memory.
        vs_store_release_ptr(<void **>&self.c.mem, iotlb.for_ring(not self.is_transmitq))
        self.iotlb = iotlb
        return old

    def untranslated(self, int most, int ahead):
        """The I/O virtual addresses among the offered buffers that the IOTLB lacks, at most `most`.

        Looks at the next `ahead` descriptors, or a few more.
        As (address, whether the device writes there). Of a chain with several of them the first.
        Asks the driver of a receiveq for a kick when it offers more: no worker waits for that. What
        is wrong with a chain is left to the worker to find.
        """
        if self.iotlb is None or not self.published:
            return []
        return untranslated(self.c, self.iotlb.for_ring(not self.is_transmitq), most, ahead)

    def set_dirty_log(self, DirtyLog log, used_gpa):
        """Log writes from now on, or no longer with None; takes effect at the next quiescence.

        `used_gpa` is what the used ring's first byte is logged as, None if its writes are not to be
        logged.
        """
        cdef LogC *c = NULL
        if log is not None:
            c = &log.c
            self.c.log_gpa = used_gpa or 0
            self.c.log_used = used_gpa is not None
        elif self.published:
            # Never back to NULL under a worker, which has looked once and loads the pointer again.
            c = &EMPTY_LOG
        # Release: the rest before the pointer that makes it count.
        vs_store_release_ptr(<void **>&self.c.dirty_log, c)
        self.dirty_log = log

    def unpublish(self):
        """Leave the ring out of what is published from now on."""
        self.published = self.moving = False

    def suspend(self):
        """The same until `resume`: its memory's addresses are not known at present."""
        self.unpublish()

    def resume(self):
        """Publish a suspended ring again, which goes on where it was."""
        self.published = self.started

    def want_kicks(self):
        """Ask the driver of a suspended transmitq for kicks; whether it has more to offer already.

        Only after every worker has passed a quiescent point since it was suspended.
        """
        want_kicks(self.c)
        # Full fence: our wish before another look. Pairs with the driver's fence between offering
        # a frame and reading what we wish (2.7.10.3).
        vs_fence()
        return has_work(self.c)

    def begin_move(self):
        """The same for a moment, until Engine.finish_move; False if it is not published anyway."""
        if self.published:
            self.published = False
            self.moving = True
        return self.moving

    def use_journal(self, Journal journal not None):
        """Make the notes of a stopped ring there from now on."""
        if self.started:
            raise ValueError(f"vring {self.c.index} is running")
        self.journal = journal
        self.c.journal = journal.slot(self.c.index)

    def forget_flows(self):
        """Where its last frames came from and went is void: its port is in another network.

        Only while no worker polls it.
        """
        self.c.src_key = self.c.dst_key = FDB_EMPTY
        self.c.src_generation = self.c.dst_generation = 0

    def forget_journal(self):
        """Notes of what the ring was are void: the frontend was told, or it is another ring."""
        self.c.journal.identity = 0

    def mark_stopped(self):
        """Forget the memory; returns the index to go on from (GET_VRING_BASE).

        Only after every worker has passed a quiescent point since the ring was unpublished.
        """
        self.started = self.published = self.moving = False
        self.memory = None
        self.iotlb = None
        self.set_dirty_log(None, None)
        self.c.desc = NULL
        self.c.mem = self.c.guest_mem = self.c.own_mem = NULL
        self.place = None
        return self.base

    @property
    def index(self):
        return self.c.index

    @property
    def is_transmitq(self):
        return bool(self.c.index & 1)

    @property
    def size(self):
        return self.c.size

    @property
    def base(self):
        """Where the ring would go on, read without stopping it, as GET_VRING_BASE has it.

        The avail index of a split ring. Of a packed one the avail position and wrap counter in the
        low half and the used ones, which are the same between two bursts, in the high half.
        """
        cdef uint32_t half
        if not self.c.packed:
            return vs_load16(&self.c.last_avail)
        half = vs_load16(&self.c.last_avail) | <uint32_t>self.c.avail_wrap << 15
        return half | half << 16

    @property
    def used_idx(self):
        return vs_load16(&self.c.last_used)

    @property
    def frames(self):
        """Chains taken from a transmitq since the port's frontend connected."""
        return vs_load64(&self.c.taken)

    @property
    def debt(self):
        """What its turns have cost beyond what is a turn, in copies of frames, and is not paid yet."""
        return vs_load32(&self.c.debt)

    @property
    def enabled(self):
        return bool(self.c.enabled)

    @enabled.setter
    def enabled(self, bint value):
        vs_store8(&self.c.enabled, value)

    def set_call(self, int fd):
        """Signal `fd` from now on, -1 for none. The old one may be in use until quiescence."""
        vs_store_int(&self.c.call_fd, fd)

    @property
    def call_fd(self):
        """What the driver is notified through, -1: it polls."""
        return self.c.call_fd

    @property
    def fault(self):
        """(name, text) of what the driver did wrong, or None."""
        # Acquire: the value behind the fault; pairs with ring_fault.
        cdef uint32_t number = vs_load_acquire32(&self.c.fault)
        if number == FAULT_NONE or number == FAULT_IOTLB_MISS:
            return None
        name, text = RING_FAULTS[number]
        return name, text.format(self.c.fault_value, self.c.fault_detail)

    @property
    def fault_value(self):
        """The first number in the text of `fault`: an address, for one that is about an address."""
        return vs_load64(&self.c.fault_value)

    @property
    def missed(self):
        """The I/O virtual address that its worker stopped at, for its frontend to translate; or None."""
        if vs_load_acquire32(&self.c.fault) != FAULT_IOTLB_MISS:
            return None
        return vs_load64(&self.c.fault_value)
