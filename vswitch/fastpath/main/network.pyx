"""Networks: broadcast domains, each with a table of addresses of its own."""

from vswitch.fastpath.main.fdb cimport Fdb
from vswitch.fastpath.main.fdb_table cimport Shares


cdef class Network:
    """Ports that frames are forwarded and flooded among. Made by Engine.add_network.

    Without `learning` it is a hub: of addresses it knows the static ones only.
    """

    def __cinit__(self, str name, fdb_size, bint learning, Shares shares):
        self.name = name
        self.fdb = Fdb(fdb_size, True, shares)
        self.learning = learning
