"""The fast path: virtqueues, FDB, TAP and the worker loop, in Cython without the GIL.

The only part of vswitch that sees guest pointers. It imports nothing else of vswitch. `engine` is
the one compiled module; the `.pxd` files beside it hold its hot bodies, one subject a file, so that
the C compiler can inline them all.
"""
