"""Egress lists, filled by hand: with what forwarding puts there, and how often it does not."""

from libc.stdint cimport uint16_t, uint32_t
from libc.string cimport memset

from vswitch.fastpath.main.worker cimport Worker
from vswitch.fastpath.shared.view cimport View
from vswitch.fastpath.shared.worker cimport Frame, WorkerC
from vswitch.fastpath.worker.cost cimport begin_turn
from vswitch.fastpath.worker.egress cimport deliver_lists, send_to


def send(Worker worker not None, bytes data not None, ports):
    """Put a frame on the lists of `ports`, by number, as often as each is named, and deliver it.

    The worker may not run. Returns how many copies that took.
    """
    cdef WorkerC *w = worker.c
    cdef const View *view = <const View *>w.shared.view
    cdef Frame *frame = &w.frames[0]
    cdef uint16_t port
    begin_turn(w)
    w.needs = w.copies = 0
    memset(frame, 0, sizeof(Frame))
    frame.seg.ptr = <char *><const char *>data
    frame.seg.len = frame.len = frame.wire_len = <uint32_t>len(data)
    frame.nseg = 1
    for port in ports:
        send_to(w, view, port, 0)
    deliver_lists(w, view)
    return w.copies
