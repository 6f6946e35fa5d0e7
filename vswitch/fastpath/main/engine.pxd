from vswitch.fastpath.main.fdb_table cimport Shares
from vswitch.fastpath.main.network cimport Network
from vswitch.fastpath.shared.worker cimport Shared
from vswitch.fastpath.sys.notify cimport vs_notifier


cdef class Engine:
    cdef Shared *shared
    cdef Shares shares
    cdef readonly Network default  # the network of ports that are told no other
    cdef readonly list workers
    cdef readonly dict ports   # by number
    cdef list retired          # (ticket, per-worker epochs or None, what goes then)
    cdef list leaving          # goes with the next publish
    cdef vs_notifier notifier  # the main thread's
    cdef readonly int aio_error  # errno, where the kernel gives no AIO
    cdef bint uring
    cdef readonly int uring_error  # errno, where there is an uplink and no io_uring for it
    cdef list injected         # addresses of Inject
    cdef unsigned long long tickets
    cdef int events_from       # the worker whose events are taken first
