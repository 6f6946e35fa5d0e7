"""A burst of frames from one port: where each goes, and the copies.

Decisions are made on a private copy of the header bytes; the guest may rewrite its frame meanwhile,
which changes what is copied but never where to.
"""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from vswitch.fastpath.shared.chain cimport walk_chain
from vswitch.fastpath.shared.frame cimport gather_bytes
from vswitch.fastpath.shared.memory cimport gpa_to_host
from vswitch.fastpath.shared.types cimport (
    BURST,
    DROP_BAD_SOURCE,
    DROP_EGRESS_DOWN,
    DROP_NO_DESTINATION,
    DROP_OVERSIZE,
    DROP_RUNT,
    DROP_SAME_PORT,
    DROP_STORM_BROADCAST,
    ETH_HLEN,
    EVENT_MAC_LEARNED,
    EVENT_MAC_LIMIT,
    EVENT_MAC_MOVED,
    KIND_TAP,
    MAX_CHAIN,
    STORM_BROADCAST,
    STORM_MULTICAST,
    STORM_UNKNOWN,
    VLAN_HLEN,
    VNET_HDR_MAX,
    VRING_DESC_F_INDIRECT,
    VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
    Counters,
    FdbC,
    Frame,
    PortC,
    PortView,
    RingC,
    Seg,
    VringDesc,
    View,
    WorkerC,
)
from vswitch.fastpath.sys.atomics cimport (
    vs_get16,
    vs_get32,
    vs_get64,
    vs_likely,
    vs_load8,
    vs_load32,
    vs_prefetch,
    vs_store8,
    vs_unlikely,
)
from vswitch.fastpath.worker.egress cimport deliver
from vswitch.fastpath.worker.events cimport post_event
from vswitch.fastpath.worker.fdb cimport (
    FDB_BUSY,
    FDB_LEARNED,
    FDB_MOVED,
    FDB_NO_ROOM,
    FDB_PORT_FULL,
    FdbResult,
    fdb_learn,
    fdb_lookup,
    fdb_prefetch,
)
from vswitch.fastpath.worker.offload cimport check_offload
from vswitch.fastpath.worker.storm cimport storm_allows
from vswitch.fastpath.worker.tap cimport tap_send

cdef enum:
    MANY_LOOKUPS = 4                # in a burst: they will be so many in the next one
    CALL_COPIES = 16                # what a notification costs; it is a system call
    ETHERTYPE_VLAN_LE = 0x0081      # 0x8100 as loaded on a little-endian machine
    ETHERTYPE_QINQ_LE = 0xA888      # 0x88a8
    ETHERTYPE_IPV4_LE = 0x0008
    ETHERTYPE_IPV6_LE = 0xDD86

cdef extern from * nogil:
    """
    #define VS_MAC_MASK 0xFFFFFFFFFFFFULL
    #if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
    #error "vswitch supports little-endian machines only"
    #endif
    """
    const uint64_t VS_MAC_MASK


cdef inline void find_vnet_header(
    RingC *ring, Frame *frame, const Seg *segs, uint32_t n
) noexcept nogil:
    """Note where the virtio_net_hdr of a chain is; one in pieces is gathered."""
    cdef uint32_t have = 0, part, i
    frame.vnet = segs[0].ptr
    if segs[0].len >= ring.hdr_len:
        return
    frame.vnet = <const char *>frame.hdr
    for i in range(n):
        part = ring.hdr_len - have
        if part > segs[i].len:
            part = segs[i].len
        memcpy(<char *>frame.hdr + have, segs[i].ptr, part)
        have += part
        if have == ring.hdr_len:
            break
    if vs_get16(frame.vnet) == 0:
        memset(frame.hdr, 0, VNET_HDR_MAX)


cdef inline int take_frame(WorkerC *w, RingC *ring, Frame *frame, const VringDesc *first) noexcept nogil:
    """Fill in `frame` from the chain at `frame.head`; -1 after faulting the ring.

    `id` and `count` are set by the caller for a chain of one; a longer one sets its own.
    The virtio_net_hdr may share a descriptor with the frame, have one of its own or be spread over
    several (5.1.6.6.1: any layout).
    """
    cdef uint64_t contiguous, total = 0
    cdef uint32_t skip = ring.hdr_len, n, i
    cdef int got
    cdef Seg *segs
    cdef char *host
    frame.drop = 0
    memset(frame.hdr, 0, VNET_HDR_MAX)
    if vs_likely(
        first.flags & (VRING_DESC_F_NEXT | VRING_DESC_F_INDIRECT | VRING_DESC_F_WRITE) == 0
        and first.len > ring.hdr_len
    ):
        host = gpa_to_host(ring.mem, first.addr, first.len, &contiguous, &ring.region_hint)
        if vs_likely(host != NULL and contiguous == first.len):
            frame.vnet = host
            frame.seg.ptr = host + ring.hdr_len
            frame.seg.len = first.len - ring.hdr_len
            frame.len = frame.seg.len
            frame.nseg = 1
            frame.more = 0
            return 0
    segs = &w.segs[w.n_segs]
    got = walk_chain(ring, frame.head, first, 0, segs, MAX_CHAIN)
    w.work += ring.walked
    if got < 0:
        return -1
    frame.id = ring.walk_id
    frame.count = ring.walk_count
    n = <uint32_t>got
    if ring.offloads and n:
        find_vnet_header(ring, frame, segs, n)
    while n and segs[0].len <= skip:
        skip -= segs[0].len
        segs += 1
        n -= 1
    if n == 0:
        frame.seg.ptr = NULL
        frame.len = 0
        frame.seg.len = 0
        frame.nseg = 0
        frame.drop = DROP_RUNT + 1
        return 0
    segs[0].ptr += skip
    segs[0].len -= skip
    for i in range(n):
        total += segs[i].len
    frame.seg = segs[0]
    frame.nseg = <uint16_t>n
    frame.more = <uint16_t>(segs + 1 - w.segs)
    frame.len = <uint32_t>total if total < 0xFFFFFFFFu else <uint32_t>0xFFFFFFFFu
    w.n_segs = <uint32_t>(segs + n - w.segs)
    return 0


cdef inline uint32_t flow_hash(WorkerC *w, const Frame *frame) noexcept nogil:
    """A hash that is equal for both directions of a flow.

    IPv4 and IPv6 addresses and, for TCP and UDP that is not fragmented, ports; MAC addresses for
    everything else.
    """
    cdef char data[64]
    cdef uint32_t have = gather_bytes(w, frame, data, 64), at = ETH_HLEN, h, ihl
    cdef uint16_t ethertype
    cdef uint8_t proto
    if have < ETH_HLEN:
        return 0
    ethertype = vs_get16(data + 12)
    if is_tag(ethertype):
        if have < at + 4:
            return 0
        ethertype = vs_get16(data + 16)
        at += 4
    if ethertype == ETHERTYPE_IPV4_LE and have >= at + 20:
        h = vs_get32(data + at + 12) ^ vs_get32(data + at + 16)
        proto = <uint8_t>data[at + 9]
        ihl = 4 * (<uint32_t>data[at] & 0xF)
        # More fragments or an offset: the ports are not in every piece.
        if (proto == 6 or proto == 17) and not vs_get16(data + at + 6) & 0xFF3F and have >= at + ihl + 4:
            h ^= <uint32_t>(vs_get16(data + at + ihl) ^ vs_get16(data + at + ihl + 2))
        h ^= proto
    elif ethertype == ETHERTYPE_IPV6_LE and have >= at + 40:
        h = (
            vs_get32(data + at + 8) ^ vs_get32(data + at + 12) ^ vs_get32(data + at + 16)
            ^ vs_get32(data + at + 20) ^ vs_get32(data + at + 24) ^ vs_get32(data + at + 28)
            ^ vs_get32(data + at + 32) ^ vs_get32(data + at + 36)
        )
        proto = <uint8_t>data[at + 6]
        if (proto == 6 or proto == 17) and have >= at + 44:
            h ^= <uint32_t>(vs_get16(data + at + 40) ^ vs_get16(data + at + 42))
        h ^= proto
    else:
        h = vs_get32(data + 2) ^ vs_get32(data + 8) ^ vs_get16(data) ^ vs_get16(data + 6)
    # Every bit of the sum reaches the low ones, of which few decide: addresses of one lab differ in
    # a byte that may lie anywhere. (The finalizer of MurmurHash3.)
    h ^= h >> 16
    h *= <uint32_t>0x85EBCA6Bu
    h ^= h >> 13
    h *= <uint32_t>0xC2B2AE35u
    return h ^ (h >> 16)


cdef inline void learn(
    WorkerC *w, uint64_t key, PortC *port, RingC *ring, uint32_t tick
) noexcept nogil:
    cdef FdbC *fdb = w.shared.fdb
    cdef int32_t old_port = -1
    # Read before learning: a change that comes in between makes the note stale at once.
    cdef uint32_t generation = vs_load32(&fdb.generation)
    cdef FdbResult result = fdb_learn(fdb, key, port.id, tick, &old_port)
    if result == FDB_BUSY:
        return  # the next frame tries again
    if vs_unlikely(result == FDB_NO_ROOM or result == FDB_PORT_FULL):
        w.counters[port.id].macs_refused += 1
        if result == FDB_PORT_FULL and not vs_load8(&port.mac_limit_told):
            vs_store8(&port.mac_limit_told, 1)
            post_event(w, EVENT_MAC_LIMIT, port.id, 0, key)
    if (result == FDB_LEARNED or result == FDB_MOVED) and vs_load32(&w.shared.report_macs):
        if result == FDB_LEARNED:
            post_event(w, EVENT_MAC_LEARNED, port.id, 0, key)
        else:
            post_event(w, EVENT_MAC_MOVED, port.id, <uint16_t>old_port, key)
    if ring != NULL:
        ring.src_key = key
        ring.src_tick = tick
        # A move counts the generation up by one, which is our own doing.
        ring.src_generation = generation + (1 if result == FDB_MOVED else 0)


cdef inline void send_to(WorkerC *w, uint16_t port, uint8_t i) noexcept nogil:
    """Put frame `i` on the list of an egress port."""
    cdef uint16_t n = w.egress_n[port]
    if n == 0:
        w.touched[w.n_touched] = port
        w.n_touched += 1
    w.egress[port][n] = i
    w.egress_n[port] = n + 1


cdef inline bint is_tag(uint16_t ethertype) noexcept nogil:
    """Whether a VLAN tag follows: what Linux takes for one, which 0x9100 is not."""
    return ethertype == ETHERTYPE_VLAN_LE or ethertype == ETHERTYPE_QINQ_LE


cdef inline uint64_t vlan_bits(const char *head) noexcept nogil:
    """The part of a key that tells the VLAN, from the first 18 bytes of a tagged frame."""
    return <uint64_t>((<uint8_t>head[14] & 0xF) << 8 | <uint8_t>head[15]) << 48


cdef inline void prefetch_lookups(WorkerC *w, const RingC *ring, uint16_t n) noexcept nogil:
    """Fetch where the destinations of a burst are in the FDB.

    A hint only: what the guest makes of its frame meanwhile is looked up all the same.
    """
    cdef uint64_t key
    cdef uint32_t i
    cdef const Frame *frame
    for i in range(n):
        frame = &w.frames[i]
        if frame.seg.len >= 18:
            key = vs_get64(frame.seg.ptr) & VS_MAC_MASK
            if not key & 1:
                if is_tag(vs_get16(frame.seg.ptr + 12)):
                    key |= vlan_bits(frame.seg.ptr)
                if key != ring.dst_key:
                    fdb_prefetch(w.shared.fdb, key)


cdef inline void classify(
    WorkerC *w, const View *view, PortC *port, RingC *ring, uint8_t i, Counters *counters
) noexcept nogil:
    """Decide where frame `i` goes. `ring` is NULL for what comes from a TAP."""
    cdef Frame *frame = &w.frames[i]
    cdef FdbC *fdb = w.shared.fdb
    cdef char head[24]
    cdef uint64_t dst, src, dst_key, src_key, vlan
    cdef uint32_t have, k, generation, tick
    cdef uint8_t offloads = ring.offloads if ring != NULL else <uint8_t>port.offloads
    cdef uint8_t bad
    cdef int32_t out
    cdef int kind
    if vs_unlikely(frame.drop):
        counters.drops[frame.drop - 1] += 1
        return
    if vs_unlikely(frame.len < ETH_HLEN):
        counters.drops[DROP_RUNT] += 1
        return
    frame.needs = 0
    frame.wire_len = frame.len
    # The flags and the gso_type: hardly ever set but by those who send much.
    if offloads and vs_get16(frame.vnet):
        bad = check_offload(w, frame, offloads, ring == NULL)
        if vs_unlikely(bad):
            counters.drops[bad - 1] += 1
            return
        w.needs |= frame.needs
    have = gather_bytes(w, frame, head, 18)
    vlan = 0
    if vs_unlikely(is_tag(vs_get16(head + 12))) and have >= 18:
        vlan = vlan_bits(head)
        if is_tag(vs_get16(head + 16)):
            frame.wire_len -= VLAN_HLEN  # as Linux has it
    if vs_unlikely(frame.wire_len > vs_load32(&port.max_len)):
        counters.drops[DROP_OVERSIZE] += 1
        return
    dst = vs_get64(head) & VS_MAC_MASK
    src = vs_get64(head + 6) & VS_MAC_MASK
    if vs_unlikely(src & 1 or src == 0):
        counters.drops[DROP_BAD_SOURCE] += 1
        return
    src_key = src | vlan
    dst_key = dst | vlan
    generation = vs_load32(&fdb.generation)
    tick = vs_load32(&fdb.tick)
    if vs_unlikely(
        ring == NULL or ring.src_key != src_key or ring.src_tick != tick
        or ring.src_generation != generation
    ):
        learn(w, src_key, port, ring, tick)
    if not dst & 1:
        if vs_likely(ring != NULL and ring.dst_key == dst_key and ring.dst_generation == generation):
            out = ring.dst_port
        else:
            out = fdb_lookup(fdb, dst_key)
            w.lookups += 1
            if ring != NULL and out >= 0:
                ring.dst_key = dst_key
                ring.dst_port = out
                ring.dst_generation = generation
        if vs_likely(out >= 0):
            if vs_unlikely(out == port.id):
                counters.drops[DROP_SAME_PORT] += 1
            elif vs_unlikely(not view.ports[out].forwarding):
                counters.drops[DROP_EGRESS_DOWN] += 1
            else:
                send_to(w, <uint16_t>out, i)
            return
    # Multicast, broadcast and unknown: to everyone else. The reserved groups 01:80:C2:00:00:0x are
    # no exception; labs run LACP, LLDP, STP and 802.1X between guests.
    if vs_unlikely(vs_load8(&port.storm)):
        if not dst & 1:
            kind = STORM_UNKNOWN
        else:
            kind = STORM_BROADCAST if dst == VS_MAC_MASK else STORM_MULTICAST
        if not storm_allows(port, kind):
            counters.drops[DROP_STORM_BROADCAST + kind] += 1
            return
    have = 0
    for k in range(view.n_flood):
        if view.flood[k] != port.id:
            send_to(w, view.flood[k], i)
            have = 1
    if vs_unlikely(not have):
        counters.drops[DROP_NO_DESTINATION] += 1


cdef inline void deliver_queues(
    WorkerC *w, const PortView *to, const uint8_t *which, uint16_t n, Counters *counters
) noexcept nogil:
    """Spread frames over several receiveqs, each flow to one of them."""
    cdef uint16_t i, q
    for q in range(to.n_receiveqs):
        w.queue_n[q] = 0
    for i in range(n):
        q = <uint16_t>(flow_hash(w, &w.frames[which[i]]) % to.n_receiveqs)
        w.queue[q][w.queue_n[q]] = which[i]
        w.queue_n[q] += 1
    for q in range(to.n_receiveqs):
        if w.queue_n[q]:
            deliver(w, to.receiveqs[q], w.queue[q], w.queue_n[q], counters)


cdef inline uint32_t extra_work(const WorkerC *w, uint32_t copies) noexcept nogil:
    """What a burst has cost besides its `copies`, in copies of short frames; 0 for an ordinary one.

    Eight descriptors or pieces make a copy, and 2 KiB do. Ordinary are up to 16 descriptors and pieces
    a copy, a descriptor being one and what is copied from or to it another, and 64 frames of 2 KiB.
    """
    cdef uint64_t pieces = w.work >> 3, lines = w.copied >> 11
    if vs_likely(pieces <= 2 * BURST or pieces <= 2 * copies):
        pieces = 0
    if vs_likely(lines <= BURST):
        return <uint32_t>pieces
    return <uint32_t>(pieces + lines)


cdef inline uint32_t turn_cost(const WorkerC *w, uint32_t copies, uint32_t extra) noexcept nogil:
    """What a turn has cost, in copies of short frames; a notification is CALL_COPIES."""
    if vs_unlikely(w.burst_calls * CALL_COPIES > BURST and w.burst_calls * CALL_COPIES > copies):
        copies = w.burst_calls * CALL_COPIES
    return copies + extra


cdef inline void begin_turn(WorkerC *w) noexcept nogil:
    w.n_segs = w.work = w.burst_calls = 0
    w.copied = 0


cdef inline uint32_t forward_burst(
    WorkerC *w, const View *view, PortC *port, RingC *ring, uint16_t n
) noexcept nogil:
    """Forward `w.frames[0..n-1]`, which came from `port`; returns how many copies that took."""
    cdef Counters *counters = &w.counters[port.id]
    cdef uint64_t total = 0
    cdef uint32_t i, copies = 0
    cdef uint16_t id, count
    cdef const PortView *to
    for i in range(n):
        vs_prefetch(w.frames[i].seg.ptr)
        total += w.frames[i].len
    if ring != NULL and ring.offloads:
        for i in range(n):
            vs_prefetch(w.frames[i].vnet)
    counters.ingress_frames += n
    counters.ingress_bytes += total
    if ring != NULL and vs_unlikely(ring.lookups > MANY_LOOKUPS):
        prefetch_lookups(w, ring, n)
    w.n_touched = 0
    w.needs = 0
    w.lookups = 0
    for i in range(n):
        classify(w, view, port, ring, <uint8_t>i, counters)
    if ring != NULL:
        ring.lookups = w.lookups
    for i in range(w.n_touched):
        id = w.touched[i]
        count = w.egress_n[id]
        w.egress_n[id] = 0
        copies += count
        to = &view.ports[id]
        if to.port.kind == KIND_TAP:
            tap_send(w, to.port, w.egress[id], count, &w.counters[id])
        elif to.n_receiveqs == 1:
            deliver(w, to.receiveqs[0], w.egress[id], count, &w.counters[id])
        else:
            deliver_queues(w, to, w.egress[id], count, &w.counters[id])
    return copies
