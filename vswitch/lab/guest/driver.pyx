"""The virtio-net driver of the software guest: what a kernel's virtio_net does with its rings.

Everything the device writes is verified when it is reaped; a violation raises DeviceError. After
one the queue's state is undefined: build a new queue, as a guest's reboot does.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from vswitch.lab.guest.mapping cimport Mapping
from vswitch.lab.guest.packed cimport packed_used_bits
from vswitch.lab.guest.ring cimport (
    ring_add,
    ring_calls_off,
    ring_calls_on,
    ring_kick_needed,
    ring_more_used,
    ring_publish,
    ring_reap,
)
from vswitch.lab.guest.vring cimport (
    USED_ID_RANGE,
    USED_IDX_RAN_AHEAD,
    USED_NOTHING_OUTSTANDING,
    USED_OUT_OF_ORDER,
    Desc,
    PackedDesc,
    Piece,
)

from vswitch.bounds import RING_SIZE_MAX
from vswitch.lab.guest.errors import DeviceError

MAX_PIECES = 64
cdef enum:
    C_MAX_PIECES = 64
    GUARD_BYTE = 0xA5


cdef void *allocate(size_t n, size_t size) except NULL:
    cdef void *p = calloc(n if n else 1, size)
    if p == NULL:
        raise MemoryError()
    return p


cdef class VirtQueue:
    """One ring with its buffers ("slots").

    Each slot is a list of pieces (gpa, length in bytes), the same number for all slots. `tables`
    holds the gpa of an indirect table for each slot, or is empty: chains lie in the ring itself.
    `packed` is the format: `desc_gpa` is then the descriptor ring, `avail_gpa` the driver event
    suppression structure and `used_gpa` the device's. With `in_order` (VIRTIO_F_IN_ORDER) chains must
    come back in the order they went, and the device may name the last of several only.
    The ring's memory is made as if it had come from elsewhere after `first_idx` chains (16 bits) of
    one descriptor each: free-running indices begin there, and a packed ring at that position, in that
    round.
    """

    def __init__(
        self,
        Mapping mapping not None,
        str name not None,
        uint32_t size,
        uint64_t desc_gpa,
        uint64_t avail_gpa,
        uint64_t used_gpa,
        list slots not None,
        list tables not None,
        *,
        uint32_t header_len,
        bint event_idx,
        bint packed=False,
        bint in_order=False,
        uint16_t first_idx=0,
    ):
        cdef uint32_t i, j
        cdef Piece *piece
        if not 2 <= size <= RING_SIZE_MAX or (size & (size - 1) and not packed):
            raise ValueError(
                f"{name}: size {size} is no {'number' if packed else 'power of two'} "
                f"from 2 to {RING_SIZE_MAX}"
            )
        if not slots or not 1 <= len(slots[0]) <= C_MAX_PIECES:
            raise ValueError(f"{name}: needs slots of 1 to {C_MAX_PIECES} pieces")
        if tables and len(tables) != len(slots):
            raise ValueError(f"{name}: {len(tables)} indirect tables for {len(slots)} slots")
        if self.pieces != NULL:
            raise ValueError(f"{name}: a queue is set up once")
        self.mapping = mapping
        self.name = name
        self.header_len = header_len
        self.slots = <uint32_t>len(slots)
        self.max_pieces = <uint32_t>len(slots[0])
        self.pieces = <Piece *>allocate(self.slots * self.max_pieces, sizeof(Piece))
        self.free_slots = <uint32_t *>allocate(self.slots, sizeof(uint32_t))
        self.ring.next = <uint16_t *>allocate(size, sizeof(uint16_t))
        self.ring.chain_size = <uint16_t *>allocate(size, sizeof(uint16_t))
        self.ring.token = <uint32_t *>allocate(size, sizeof(uint32_t))
        self.ring.posted_len = <uint32_t *>allocate(size, sizeof(uint32_t))
        for i in range(self.slots):
            if len(slots[i]) != <int>self.max_pieces:
                raise ValueError(f"{name}: slots with different numbers of pieces")
            for j in range(self.max_pieces):
                piece = self.slot_pieces(i) + j
                piece.gpa, piece.len = slots[i][j]
                piece.ptr = mapping.at(piece.gpa, piece.len)
        self.slot_len = sum([length for _, length in slots[0]])
        if tables:
            self.tables = <Desc **>allocate(self.slots, sizeof(Desc *))
            self.table_gpas = <uint64_t *>allocate(self.slots, sizeof(uint64_t))
            for i in range(self.slots):
                self.table_gpas[i] = tables[i]
                self.tables[i] = <Desc *>mapping.at(
                    self.table_gpas[i], self.max_pieces * sizeof(Desc)
                )
        # The stack hands out slot 0 first.
        for i in range(self.slots):
            self.free_slots[i] = self.slots - 1 - i
        self.num_free_slots = self.slots
        self.ring.size = <uint16_t>size
        self.ring.event_idx = event_idx
        self.ring.in_order = in_order
        self.ring.packed = packed
        self.ring.num_free = <uint16_t>size
        self.ring.avail_idx = first_idx
        self.ring.published_idx = first_idx
        self.ring.used_idx = first_idx
        for i in range(size):
            self.ring.next[i] = <uint16_t>((i + 1) % size)
        mapping.fill(desc_gpa, 16 * size, 0)
        if packed:
            self.lay_packed(mapping, desc_gpa, avail_gpa, used_gpa)
        else:
            self.lay_split(mapping, desc_gpa, avail_gpa, used_gpa)
        ring_calls_off(&self.ring)

    cdef int lay_split(
        self, Mapping mapping, uint64_t desc_gpa, uint64_t avail_gpa, uint64_t used_gpa
    ) except -1:
        cdef uint32_t size = self.ring.size
        cdef uint16_t first_idx = self.ring.used_idx
        mapping.fill(avail_gpa, 6 + 2 * size, 0)
        mapping.fill(used_gpa, 6 + 8 * size, 0)
        self.ring.desc = <Desc *>mapping.at(desc_gpa, 16 * size)
        self.ring.avail = <uint16_t *>mapping.at(avail_gpa, 6 + 2 * size)
        self.ring.used = <uint16_t *>mapping.at(used_gpa, 6 + 8 * size)
        self.ring.kicked_idx = first_idx
        self.ring.seen_used_idx = first_idx
        self.ring.avail[1] = first_idx
        self.ring.used[1] = first_idx
        if self.ring.in_order:
            # Descriptors are taken in ring order, so there is but one place to be (2.7.9).
            self.ring.free_head = self.ring.oldest = <uint16_t>(first_idx & (size - 1))
        return 0

    cdef int lay_packed(
        self, Mapping mapping, uint64_t desc_gpa, uint64_t avail_gpa, uint64_t used_gpa
    ) except -1:
        cdef uint32_t size = self.ring.size
        cdef uint32_t i
        mapping.fill(avail_gpa, 4, 0)
        mapping.fill(used_gpa, 4, 0)
        self.ring.packed_desc = <PackedDesc *>mapping.at(desc_gpa, 16 * size)
        self.ring.avail = <uint16_t *>mapping.at(avail_gpa, 4)
        self.ring.used = <uint16_t *>mapping.at(used_gpa, 4)
        self.ring.id_at = <uint16_t *>allocate(size, sizeof(uint16_t))
        self.ring.avail_at = self.ring.used_at = <uint16_t>(self.ring.used_idx % size)
        # Both wrap counters are 1 in the first round (2.8.1).
        self.ring.avail_wrap = self.ring.used_wrap = 1 ^ (self.ring.used_idx // size & 1)
        for i in range(size):
            # Behind us lies what was used in this round, before us what was in the one before it.
            self.ring.packed_desc[i].flags = packed_used_bits(
                self.ring.used_wrap ^ (i >= self.ring.used_at)
            )
        return 0

    def __dealloc__(self):
        free(self.pieces)
        free(self.tables)
        free(self.table_gpas)
        free(self.free_slots)
        free(self.ring.next)
        free(self.ring.chain_size)
        free(self.ring.token)
        free(self.ring.posted_len)
        free(self.ring.id_at)

    cdef Piece *slot_pieces(self, uint32_t slot) noexcept nogil:
        return self.pieces + slot * self.max_pieces

    cdef int32_t add(
        self, uint32_t slot, Piece *pieces, uint32_t n, bint writable
    ) noexcept nogil:
        cdef Desc *table = NULL
        cdef uint64_t gpa = 0
        if self.tables != NULL:
            table = self.tables[slot]
            gpa = self.table_gpas[slot]
        return ring_add(
            &self.ring, pieces, 0 if writable else n, n if writable else 0, slot, table, gpa
        )

    cdef object broken(self, int rule):
        cdef uint32_t value = self.ring.bad_value
        if rule == USED_IDX_RAN_AHEAD:
            text = (
                f"used.idx is {value} after {self.ring.used_idx}, "
                f"with {self.ring.outstanding} chains outstanding"
            )
        elif rule == USED_ID_RANGE:
            text = f"used id {value} is outside of a ring of size {self.ring.size}"
        elif rule == USED_OUT_OF_ORDER:
            text = f"used id {value} is not the next one, and the ring is in order"
        elif rule == USED_NOTHING_OUTSTANDING:
            text = f"entry {self.ring.used_at} is used (id {value}), and nothing is outstanding"
        else:
            text = f"used id {value} is not outstanding"
        return DeviceError(f"{self.name}: {text} (used element {self.ring.used_idx})")

    @property
    def size(self):
        """Entries of the ring."""
        return self.ring.size

    @property
    def avail_idx(self):
        """Free-running count of chains that the device was given, 16 bits."""
        return self.ring.published_idx

    @property
    def used_idx(self):
        """Free-running count of used chains reaped, 16 bits."""
        return self.ring.used_idx

    @property
    def packed(self):
        """Whether the ring is a packed one."""
        return self.ring.packed

    @property
    def skipped(self):
        """Chains, as far as reaped, that the device used without naming them (IN_ORDER)."""
        return self.ring.skipped

    @property
    def used_position(self):
        """Of a packed ring: where the next used descriptor is looked for, wrap counter in bit 15."""
        return self.ring.used_at | self.ring.used_wrap << 15

    @property
    def avail_position(self):
        """Of a packed ring: the next entry to make available, wrap counter in bit 15."""
        return self.ring.avail_at | self.ring.avail_wrap << 15

    @property
    def outstanding(self):
        """Chains that the device has and did not give back, as far as reaped."""
        return self.ring.outstanding

    @property
    def free_slot_count(self):
        return self.num_free_slots

    def take_kick(self):
        """Whether the device wants a notification for what was published since the last call."""
        if ring_kick_needed(&self.ring):
            self.kicks += 1
            return True
        return False

    def more_used(self):
        """Whether there is something to reap."""
        return ring_more_used(&self.ring)

    def calls_on(self):
        """Ask for notifications. True when there is something to reap already: do not sleep."""
        return ring_calls_on(&self.ring)

    def calls_off(self):
        """Ask for no notifications."""
        ring_calls_off(&self.ring)


cdef class TransmitQueue(VirtQueue):
    """A transmitq: frames go out through its slots."""

    cdef uint32_t lay(self, uint32_t slot, Piece *chain, uint32_t total) noexcept nogil:
        """The pieces that `total` bytes take in a slot, into `chain`. Returns how many."""
        cdef Piece *pieces = self.slot_pieces(slot)
        cdef uint32_t n = 0
        while total:
            chain[n] = pieces[n]
            if chain[n].len > total:
                chain[n].len = total
            total -= chain[n].len
            n += 1
        return n

    def send(self, list frames not None, Py_ssize_t first=0, bytes header=None):
        """Give frames[first:] to the device as far as slots and descriptors last, and publish them.

        `header` is the virtio-net header for all of them (default: zeros). Returns how many went.
        ValueError for a frame that is longer than a slot.
        """
        cdef uint8_t[64] zeros
        cdef Piece[C_MAX_PIECES] chain
        cdef const uint8_t *head = zeros
        cdef uint32_t slot, length, n
        cdef Py_ssize_t i
        cdef bytes frame
        memset(zeros, 0, sizeof(zeros))
        if header is not None:
            if len(header) != <int>self.header_len:
                raise ValueError(f"a header of {len(header)} bytes, not {self.header_len}")
            head = <const uint8_t *>PyBytes_AS_STRING(header)
        i = first
        try:
            for i in range(first, len(frames)):
                if self.num_free_slots == 0:
                    return i - first
                frame = frames[i]
                length = <uint32_t>PyBytes_GET_SIZE(frame)
                if length > self.slot_len - self.header_len:
                    raise ValueError(
                        f"{self.name}: a frame of {length} bytes, "
                        f"slots hold {self.slot_len - self.header_len}"
                    )
                slot = self.free_slots[self.num_free_slots - 1]
                n = self.lay(slot, chain, self.header_len + length)
                if self.tables == NULL and n > self.ring.num_free:
                    if n > self.ring.size:
                        raise ValueError(
                            f"{self.name}: a chain of {n} in a ring of size {self.ring.size}"
                        )
                    return i - first
                self.write_slot(slot, 0, head, self.header_len)
                self.write_slot(
                    slot, self.header_len, <const uint8_t *>PyBytes_AS_STRING(frame), length
                )
                if self.add(slot, chain, n, False) < 0:
                    return i - first
                self.num_free_slots -= 1
                self.frames += 1
                self.bytes += length
            return len(frames) - first
        finally:
            ring_publish(&self.ring)

    cdef void write_slot(
        self, uint32_t slot, uint32_t offset, const uint8_t *data, uint32_t length
    ) noexcept nogil:
        cdef Piece *piece = self.slot_pieces(slot)
        cdef uint32_t room
        while length:
            if offset >= piece.len:
                offset -= piece.len
                piece += 1
                continue
            room = piece.len - offset
            if room > length:
                room = length
            memcpy(piece.ptr + offset, data, room)
            data += room
            length -= room
            offset += room

    def reap(self):
        """Take back what the device has sent. Returns the number of chains.

        DeviceError when the used ring is not right. The written length is not looked at: for a
        chain that the device only reads, devices put various things there.
        """
        cdef uint32_t slot = 0
        cdef uint32_t length = 0
        cdef int rc
        cdef int n = 0
        while True:
            rc = ring_reap(&self.ring, &slot, &length)
            if rc < 0:
                raise self.broken(rc)
            if rc == 0:
                break
            self.free_slots[self.num_free_slots] = slot
            self.num_free_slots += 1
            n += 1
        if not self.ring.calls_wanted and n:
            ring_calls_off(&self.ring)
        return n


cdef class ReceiveQueue(VirtQueue):
    """A receiveq: its slots are posted for the device to fill.

    With `guard_len`, that many bytes after each piece of a slot belong to the slot as well: they
    and the pieces are filled before they are posted, and what the device did not report as written
    must still be so when it is reaped.

    `strict` holds the device to num_buffers = 1 without mergeable buffers as well (VIRTIO 1.2
    section 5.1.6.4.1): drivers do not look at it there, and not every device writes it.
    """

    def __init__(self, *args, bint mergeable, uint32_t guard_len=0, **kwargs):
        super().__init__(*args, **kwargs)
        self.mergeable = mergeable
        self.guard_len = guard_len
        self.strict = True

    def post(self, int most=-1):
        """Post free slots, at most `most` (negative: all that fit), and publish them."""
        cdef Piece *piece
        cdef uint32_t slot, j
        cdef int n = 0
        while self.num_free_slots and n != most:
            slot = self.free_slots[self.num_free_slots - 1]
            piece = self.slot_pieces(slot)
            if self.tables == NULL and self.max_pieces > self.ring.num_free:
                break
            if self.guard_len:
                for j in range(self.max_pieces):
                    self.mapping.fill(piece[j].gpa, piece[j].len + self.guard_len, GUARD_BYTE)
            if self.add(slot, piece, self.max_pieces, True) < 0:
                break
            self.num_free_slots -= 1
            n += 1
        ring_publish(&self.ring)
        return n

    cdef uint32_t take(self, uint32_t *length, uint32_t least) except *:
        """Reap one chain that must be there and hold `least` bytes; its slot becomes free."""
        cdef uint32_t slot = 0
        cdef int rc = ring_reap(&self.ring, &slot, length)
        if rc < 0:
            raise self.broken(rc)
        if length[0] > self.slot_len:
            raise DeviceError(
                f"{self.name}: used length {length[0]} is more than the {self.slot_len} bytes posted"
            )
        if length[0] < least:
            raise DeviceError(
                f"{self.name}: used length {length[0]} is less than the {least} bytes it must have"
            )
        self.free_slots[self.num_free_slots] = slot
        self.num_free_slots += 1
        if self.guard_len:
            self.check_guard(slot, length[0])
        return slot

    def recv(self, int most):
        """Up to `most` frames, without their headers; does not post the buffers again."""
        return [frame for _, frame in self.recv_with_headers(most)]

    def recv_with_headers(self, int most):
        """Up to `most` pairs (virtio-net header, frame), mergeable buffers put together.

        DeviceError when ids, lengths, num_buffers or the bytes past the written length are not as
        the device must leave them.
        """
        cdef list result = []
        cdef list parts
        cdef bytes header, frame
        cdef uint32_t slot
        cdef uint32_t length = 0
        cdef uint32_t num_buffers, i
        while len(result) < most and ring_more_used(&self.ring):
            slot = self.take(&length, self.header_len)
            header = self.gather(slot, 0, self.header_len)
            frame = self.gather(slot, self.header_len, length)
            if self.header_len >= 12:
                num_buffers = (<uint8_t>header[10]) | (<uint32_t><uint8_t>header[11] << 8)
                if not self.mergeable and not self.strict:
                    num_buffers = 1
                elif not self.mergeable and num_buffers != 1:
                    raise DeviceError(
                        f"{self.name}: num_buffers is {num_buffers} without mergeable buffers, "
                        "must be 1"
                    )
                if num_buffers == 0:
                    raise DeviceError(f"{self.name}: num_buffers is 0")
                if num_buffers > 1:
                    parts = [frame]
                    for i in range(1, num_buffers):
                        if not ring_more_used(&self.ring):
                            raise DeviceError(
                                f"{self.name}: num_buffers is {num_buffers}, "
                                f"but only {i} of them were used together"
                            )
                        slot = self.take(&length, 1)
                        parts.append(self.gather(slot, 0, length))
                    frame = b"".join(parts)
            self.frames += 1
            self.bytes += <uint64_t>len(frame)
            result.append((header, frame))
        if result and not self.ring.calls_wanted:
            ring_calls_off(&self.ring)
        return result

    cdef bytes gather(self, uint32_t slot, uint32_t offset, uint32_t end):
        """Bytes `offset` to `end` of the buffer that the slot's pieces form."""
        cdef Piece *piece = self.slot_pieces(slot)
        cdef uint32_t length = end - offset
        cdef uint32_t room
        cdef bytes data = PyBytes_FromStringAndSize(NULL, length)
        cdef char *to = PyBytes_AS_STRING(data)
        while length:
            if offset >= piece.len:
                offset -= piece.len
                piece += 1
                continue
            room = piece.len - offset
            if room > length:
                room = length
            memcpy(to, piece.ptr + offset, room)
            to += room
            length -= room
            offset += room
        return data

    cdef int check_guard(self, uint32_t slot, uint32_t length) except -1:
        cdef Piece *piece = self.slot_pieces(slot)
        cdef uint32_t i, j, written
        for i in range(self.max_pieces):
            written = length if length < piece[i].len else piece[i].len
            length -= written
            for j in range(written, piece[i].len + self.guard_len):
                if piece[i].ptr[j] != GUARD_BYTE:
                    raise DeviceError(
                        f"{self.name}: the device wrote at byte {j} of piece {i} (gpa "
                        f"{piece[i].gpa + j:#x}), past what it reported"
                    )
        return 0
