"""Whether a frontend shares the guest's memory or keeps a private copy of the file it handed over.

A private mapping (QEMU without share=on) of the same file looks like shared memory: the kernel
even allocates a zeroed page in the file wherever the guest writes. Only the frontend's own list of
mappings tells the two apart.
"""

from __future__ import annotations

import os
from pathlib import Path


def is_private_copy(pid: int | None, uva: int, file: tuple[int, int]) -> bool:
    """Whether process `pid` has a file (st_dev, st_ino) mapped privately at address `uva`.

    False also where that cannot be told: the process is in another PID namespace, or belongs to
    somebody else, or is not the one who mapped the memory.
    """
    if not pid:
        return False
    dev, ino = file
    wanted = f"{os.major(dev):02x}:{os.minor(dev):02x}", str(ino)
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
    except OSError:
        return False
    for line in lines:
        bounds, rights, _offset, device, inode = line.split(maxsplit=5)[:5]
        start, _, end = bounds.partition("-")
        if int(start, 16) <= uva < int(end, 16):
            return (device, inode) == wanted and rights[3] == "p"
    return False
