"""What a worker forwards by: made by the main thread, and never changed once it is published."""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t

from vswitch.fastpath.shared.port cimport PortC
from vswitch.fastpath.shared.ring cimport RingC
from vswitch.fastpath.shared.sizes cimport MAX_PORTS, MAX_WORKERS

cdef struct PortView:
    PortC *port
    RingC **receiveqs      # enabled and started; NULL for a TAP
    uint16_t n_receiveqs
    uint8_t forwarding     # takes frames: has a receiveq, or is a TAP that is up
    RingC **rings          # by vring index, NULL where there is none
    uint16_t n_rings
    uint16_t n_flood
    const uint16_t *flood  # ids of the ports of its network that take frames
    int32_t peer           # id of the port at the other end of its cable; -1 if that is missing

cdef struct WorkerView:
    RingC **transmitqs
    uint32_t n_transmitqs
    PortC **taps
    uint32_t n_taps
    uint8_t poll_only

cdef struct View:          # main; immutable once published
    uint32_t n_workers
    PortView ports[MAX_PORTS]
    WorkerView workers[MAX_WORKERS]
