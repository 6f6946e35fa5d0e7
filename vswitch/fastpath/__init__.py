"""The fast path: virtqueues, FDB, TAP and the worker loop, in Cython without the GIL.

The only part of vswitch that sees guest pointers. It imports nothing else of vswitch. The
workers' loop is compiled into one module, `engine`; the `.pxd` files beside it hold its hot bodies,
one subject a file, so that the C compiler can inline them all.
"""
