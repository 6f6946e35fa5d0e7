"""Bounds that several parts have to agree on, the fast path among them.

Compiled code has them in fastpath/shared/sizes.pxd; tests/unit/fastpath/test_words.py holds both
together.
"""

from __future__ import annotations

QUEUE_PAIRS_MAX = 128
"""Queue pairs of a port."""
RING_SIZE_MAX = 32768
"""Entries of a virtqueue (VIRTIO 1.2, 2.7 and 2.8.10.1)."""
WORKERS_MAX = 64
"""Poll threads of a switch."""
MTU_MIN = 68
"""Bytes: what IPv4 takes at least (RFC 791)."""
MTU_MAX = 65535
"""Bytes: as much as an IP packet can have."""
SUN_PATH_LEN_MAX = 107
"""Bytes of a Unix socket's path: `sun_path` has 108 with the terminating NUL."""
PAGE_MAX = 256
"""Elements of a page of what can be asked in pages."""
