"""A burst of frames from one port: where each goes, and the copies.

Decisions are made on a private copy of the header bytes; the guest may rewrite its frame meanwhile,
which changes what is copied but never where to.
"""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from vswitch.fastpath.shared.ethernet cimport VS_MAC_MASK, is_tag, vlan_bits
from vswitch.fastpath.shared.fdb cimport FdbC
from vswitch.fastpath.shared.frame cimport gather_bytes
from vswitch.fastpath.shared.port cimport INGRESS_CABLE, INGRESS_HUB, INGRESS_STORM, PortC
from vswitch.fastpath.shared.ring cimport RingC
from vswitch.fastpath.shared.sizes cimport ETH_HLEN, VLAN_HLEN
from vswitch.fastpath.shared.view cimport PortView, View
from vswitch.fastpath.shared.words cimport (
    DROP_BAD_SOURCE,
    DROP_EGRESS_DOWN,
    DROP_NO_DESTINATION,
    DROP_OVERSIZE,
    DROP_RUNT,
    DROP_SAME_PORT,
    EVENT_FDB_GROWS,
    EVENT_MAC_LEARNED,
    EVENT_MAC_LIMIT,
    EVENT_MAC_MOVED,
    Counters,
)
from vswitch.fastpath.shared.worker cimport Frame, WorkerC
from vswitch.fastpath.sys.atomics cimport (
    vs_apart,
    vs_get16,
    vs_get64,
    vs_likely,
    vs_load32,
    vs_load8,
    vs_prefetch,
    vs_store8,
    vs_unlikely,
)
from vswitch.fastpath.worker.egress cimport deliver_lists, send_to
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
    fdb_asks,
    fdb_prefetch,
)
from vswitch.fastpath.worker.offload cimport check_offload
from vswitch.fastpath.worker.storm cimport storm_stage
from vswitch.fastpath.worker.variant cimport make_variant, variant_fits

cdef enum:
    MANY_LOOKUPS = 4       # in a burst: they will be so many in the next one


cdef inline vs_apart learn(
    WorkerC *w, uint64_t key, PortC *port, RingC *ring, uint32_t tick
) noexcept nogil:
    cdef FdbC *fdb = port.fdb
    cdef int32_t old_port = -1
    # Read before learning: a change that comes in between makes the note stale at once.
    cdef uint32_t generation = vs_load32(&fdb.generation)
    cdef FdbResult result
    if vs_unlikely(w.stages & INGRESS_HUB):
        return
    result = fdb_learn(fdb, key, port.id, tick, &old_port)
    if result == FDB_BUSY:
        return  # the next frame tries again
    if vs_unlikely(fdb_asks(fdb)):
        post_event(w, EVENT_FDB_GROWS, port.id, 0, 0)
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


cdef inline void prefetch_lookups(
    WorkerC *w, const PortC *port, const RingC *ring, uint16_t n
) noexcept nogil:
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
                    fdb_prefetch(port.fdb, key)


cdef inline bint admit(
    WorkerC *w, PortC *port, const RingC *ring, Frame *frame, uint64_t *dst, uint64_t *src,
    Counters *counters,
) noexcept nogil:
    """Whether a frame may go further, and its addresses as the FDB has them, with the VLAN above.

    `ring` is NULL for what comes from a TAP. (Not in one structure: the compiler would make one vector
    of both, and wait for memory to have what it has just written there, 5 ns a frame.)
    """
    cdef char *head = w.head
    cdef uint64_t vlan = 0
    cdef uint32_t have
    cdef uint8_t offloads = ring.offloads if ring != NULL else <uint8_t>port.offloads
    cdef uint8_t bad
    if vs_unlikely(frame.drop):
        counters.drops[frame.drop - 1] += 1
        return False
    if vs_unlikely(frame.len < ETH_HLEN):
        counters.drops[DROP_RUNT] += 1
        return False
    frame.needs = 0
    frame.wire_len = frame.len
    # The flags and the gso_type: hardly ever set but by those who send much.
    if offloads and vs_get16(frame.vnet):
        bad = check_offload(w, frame, offloads, ring == NULL)
        if vs_unlikely(bad):
            counters.drops[bad - 1] += 1
            return False
        w.needs |= frame.needs
    have = gather_bytes(w, frame, head, 18)
    if vs_unlikely(is_tag(vs_get16(head + 12))) and have >= 18:
        vlan = vlan_bits(head)
        if is_tag(vs_get16(head + 16)):
            frame.wire_len -= VLAN_HLEN  # as Linux has it
    if vs_unlikely(frame.wire_len > vs_load32(&port.max_len)):
        counters.drops[DROP_OVERSIZE] += 1
        return False
    dst[0] = vs_get64(head) & VS_MAC_MASK
    src[0] = vs_get64(head + 6) & VS_MAC_MASK
    # To a cable all addresses are alike.
    if vs_unlikely((src[0] & 1 or src[0] == 0) and not w.stages & INGRESS_CABLE):
        counters.drops[DROP_BAD_SOURCE] += 1
        return False
    src[0] |= vlan
    dst[0] |= vlan
    return True


cdef inline int32_t find_port(
    WorkerC *w, const FdbC *fdb, RingC *ring, uint64_t key, uint32_t generation
) noexcept nogil:
    """The port that an address is behind, -1 if that is not known."""
    cdef int32_t out
    if vs_likely(ring != NULL and ring.dst_key == key and ring.dst_generation == generation):
        return ring.dst_port
    out = fdb_lookup(fdb, key)
    w.lookups += 1
    if ring != NULL and out >= 0:
        ring.dst_key = key
        ring.dst_port = out
        ring.dst_generation = generation
    return out


cdef inline uint8_t with_addresses(
    WorkerC *w, const View *view, uint8_t i
) noexcept nogil:
    """Frame `i` with the addresses that it was let through with, whatever its sender makes of them."""
    if vs_unlikely(not variant_fits(w, &w.frames[i])):
        deliver_lists(w, view)
    return make_variant(w, &w.frames[i], w.head)


cdef inline vs_apart flood(
    WorkerC *w, const View *view, PortC *port, uint8_t i, Counters *counters
) noexcept nogil:
    """Multicast, broadcast and unknown: to everyone else in the network.

    The reserved groups 01:80:C2:00:00:0x are no exception; labs run LACP, LLDP, STP and 802.1X
    between guests.
    """
    cdef const PortView *mine = &view.ports[port.id]
    cdef uint32_t k
    cdef bint sent = False
    if vs_unlikely(w.stages & INGRESS_STORM):
        if not storm_stage(port, w.head, counters):
            return
        i = with_addresses(w, view, i)
    for k in range(mine.n_flood):
        if mine.flood[k] != port.id:
            send_to(w, view, mine.flood[k], i)
            sent = True
    if vs_unlikely(not sent):
        counters.drops[DROP_NO_DESTINATION] += 1


cdef inline bint classify(
    WorkerC *w, const View *view, PortC *port, RingC *ring, uint8_t i, Counters *counters
) noexcept nogil:
    """Decide where frame `i` goes; whether it is to be flooded. `ring` is NULL for what comes from a TAP."""
    cdef FdbC *fdb = port.fdb
    cdef uint64_t dst, src
    cdef uint32_t generation, tick
    cdef int32_t out
    if not admit(w, port, ring, &w.frames[i], &dst, &src, counters):
        return False
    generation = vs_load32(&fdb.generation)
    tick = vs_load32(&fdb.tick)
    if vs_unlikely(
        ring == NULL or ring.src_key != src or ring.src_tick != tick
        or ring.src_generation != generation
    ):
        learn(w, src, port, ring, tick)
    if dst & 1:
        return True
    out = find_port(w, fdb, ring, dst, generation)
    if vs_unlikely(out < 0):
        return True
    if vs_unlikely(out == port.id):
        counters.drops[DROP_SAME_PORT] += 1
    elif vs_unlikely(not view.ports[out].forwarding):
        counters.drops[DROP_EGRESS_DOWN] += 1
    else:
        send_to(w, view, <uint16_t>out, i)
    return False


cdef inline void cross(
    WorkerC *w, const View *view, PortC *port, RingC *ring, uint8_t i, Counters *counters
) noexcept nogil:
    """Frame `i` came from one end of a cable: it leaves by the other."""
    cdef int32_t peer = view.ports[port.id].peer
    cdef uint64_t dst, src
    if not admit(w, port, ring, &w.frames[i], &dst, &src, counters):
        return
    if vs_unlikely(peer < 0):
        counters.drops[DROP_NO_DESTINATION] += 1
    elif vs_unlikely(not view.ports[peer].forwarding):
        counters.drops[DROP_EGRESS_DOWN] += 1
    else:
        send_to(w, view, <uint16_t>peer, i)


cdef inline uint32_t forward_burst(
    WorkerC *w, const View *view, PortC *port, RingC *ring, uint16_t n
) noexcept nogil:
    """Forward `w.frames[0..n-1]`, which came from `port`; returns how many copies that took."""
    cdef Counters *counters = &w.counters[port.id]
    cdef uint64_t total = 0
    cdef uint32_t i
    for i in range(n):
        vs_prefetch(w.frames[i].seg.ptr)
        total += w.frames[i].len
    if ring != NULL and ring.offloads:
        for i in range(n):
            vs_prefetch(w.frames[i].vnet)
    counters.ingress_frames += n
    counters.ingress_bytes += total
    if ring != NULL and vs_unlikely(ring.lookups > MANY_LOOKUPS):
        prefetch_lookups(w, port, ring, n)
    w.needs = w.copies = 0
    w.lookups = 0
    w.stages = vs_load8(&port.ingress)
    if vs_unlikely(w.stages & INGRESS_CABLE):
        for i in range(n):
            cross(w, view, port, ring, <uint8_t>i, counters)
    else:
        for i in range(n):
            if classify(w, view, port, ring, <uint8_t>i, counters):
                flood(w, view, port, <uint8_t>i, counters)
    if ring != NULL:
        ring.lookups = w.lookups
    deliver_lists(w, view)
    return w.copies
