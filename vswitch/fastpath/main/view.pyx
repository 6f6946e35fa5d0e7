"""What workers forward by, made of the main thread's ports and rings."""

from libc.stdint cimport uint16_t, uint32_t
from libc.stdlib cimport calloc, free

from vswitch.fastpath.main.port cimport Port
from vswitch.fastpath.main.ring cimport Ring
from vswitch.fastpath.shared.port cimport PortC
from vswitch.fastpath.shared.ring cimport RingC
from vswitch.fastpath.shared.view cimport PortView, View, WorkerView
from vswitch.fastpath.shared.words cimport FAULT_IOTLB_MISS


cdef class Shown:
    """A view that was replaced, and that workers may be using."""

    def __dealloc__(self):
        free(self.view)


cdef View *build_view(dict ports, uint32_t n_workers) except NULL:
    """A view of ports, by number, for free(3); without those that are removed or paused."""
    cdef size_t n_rings = 0, n_ports
    cdef View *view
    cdef char *at
    cdef Port port
    cdef Ring ring
    cdef PortView *shown
    cdef WorkerView *mine
    cdef int index
    shown_ports = [p for p in ports.values() if not p.removed and not p.paused]
    n_ports = len(shown_ports)
    for port in shown_ports:
        if port.rings:
            n_rings += max(port.rings) + 1
    # View, then pointer arrays: rings by index, receiveqs and transmitqs (at most n_rings
    # each) and TAPs; then the flood lists.
    view = <View *>calloc(
        1, sizeof(View) + 3 * n_rings * sizeof(void *) + n_ports * sizeof(void *) + 2 * n_ports
    )
    if view == NULL:
        raise MemoryError
    at = <char *>view + sizeof(View)
    view.n_workers = n_workers
    for port in shown_ports:
        shown = &view.ports[port.c.id]
        shown.port = port.c
        shown.rings = <RingC **>at
        if port.rings:
            shown.n_rings = max(port.rings) + 1
        at += shown.n_rings * sizeof(void *)
        shown.receiveqs = <RingC **>at
        for index in sorted(port.rings):
            ring = port.rings[index]
            if not ring.published or ring.c.fault not in (0, FAULT_IOTLB_MISS):
                continue
            shown.rings[index] = ring.c
            if not index & 1 and ring.c.enabled:
                shown.receiveqs[shown.n_receiveqs] = ring.c
                shown.n_receiveqs += 1
        at += shown.n_receiveqs * sizeof(void *)
        shown.forwarding = shown.n_receiveqs > 0 or port.is_tap
    for index in range(<int>n_workers):
        mine = &view.workers[index]
        mine.transmitqs = <RingC **>at
        for port in shown_ports:
            for ring in port.rings.values():
                if view.ports[port.c.id].rings[ring.c.index] == NULL or ring.worker != index:
                    continue
                mine.transmitqs[mine.n_transmitqs] = ring.c
                mine.n_transmitqs += 1
                mine.poll_only |= ring.c.poll_only
        at += mine.n_transmitqs * sizeof(void *)
    mine = &view.workers[0]
    mine.taps = <PortC **>at
    for port in shown_ports:
        if port.is_tap:
            mine.taps[mine.n_taps] = port.c
            mine.n_taps += 1
    at += mine.n_taps * sizeof(void *)
    add_flood_lists(view, shown_ports, <uint16_t *>at)
    for port in shown_ports:
        view.ports[port.c.id].peer = -1 if port.peer is None else port.peer.c.id
    return view


cdef int add_flood_lists(View *view, list shown_ports, uint16_t *at) except -1:
    """Have all ports of a network share a list of those among them that take frames."""
    cdef dict of_network = {}
    cdef Port port
    cdef const uint16_t *first
    cdef uint16_t count
    for port in shown_ports:
        if port.network is not None:
            of_network.setdefault(port.network, []).append(port)
    for members in of_network.values():
        first = at
        for port in members:
            if view.ports[port.c.id].forwarding:
                at[0] = port.c.id
                at += 1
        count = <uint16_t>(at - first)
        for port in members:
            view.ports[port.c.id].flood = first
            view.ports[port.c.id].n_flood = count
    return 0
