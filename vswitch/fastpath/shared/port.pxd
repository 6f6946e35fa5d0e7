"""A port, as workers see it. The package says what *main* and *atomic* mean."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from vswitch.fastpath.shared.fdb cimport FdbC

# What storm control tells apart.
cdef enum StormKind:
    STORM_BROADCAST
    STORM_MULTICAST
    STORM_UNKNOWN          # unicast to an address that is not known
    N_STORM

# What frames from a port pass besides being forwarded: nothing for most ports.
cdef enum IngressStage:
    INGRESS_STORM = 0x01   # worker/storm.pxd: some kind of frame is limited
    INGRESS_HUB = 0x02     # its network learns no addresses
    INGRESS_CABLE = 0x04   # it is one end of a cable: what comes leaves the other

cdef enum PortKind:
    KIND_VHOST
    KIND_TAP

cdef struct PortC:
    uint16_t id            # main
    uint8_t kind           # main
    uint8_t link_down      # atomic; switched off by the user
    uint32_t max_len       # atomic; longest Ethernet frame without FCS and second VLAN tag, bytes
    int tap_fd             # main
    uint32_t offloads      # main; OFFLOAD_* that a TAP takes and may ask for, 0 for guests
    uint32_t tap_lost      # atomic; the interface was deleted under us
    uint8_t mac_limit_told # atomic; main heard that addresses are refused
    uint8_t ingress        # atomic; INGRESS_*, looked at for each burst
    FdbC *fdb              # main; of its network, or of the last one; changed while no worker sees it
    # A token bucket a kind, see worker/storm.pxd.
    uint64_t storm_period_ns[N_STORM]  # atomic; time that a frame takes up, 0: not limited
    uint64_t storm_burst_ns[N_STORM]   # atomic; ... and that the bucket holds
    uint64_t storm_full_ns[N_STORM]    # atomic; when the bucket is full again
