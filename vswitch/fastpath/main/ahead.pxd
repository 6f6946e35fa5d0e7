from vswitch.fastpath.shared.memory cimport MemTable
from vswitch.fastpath.shared.ring cimport RingC


cdef list untranslated(const RingC *ring, MemTable *table, int most, int ahead)
