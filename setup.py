"""Builds the Cython extensions; everything else about the package is in pyproject.toml."""

import os
import sys
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

sys.path.insert(0, str(Path(__file__).parent))
from vswitch.lab import requirements

METADATA = {"egg_info", "dist_info", "sdist"}
"""What tells about the package, for which nothing is compiled."""

CFLAGS = ["-O3", "-fno-strict-aliasing", "-fno-plt", "-Wall", "-Wno-unused-function"]
LDFLAGS = []

# `make fuzz` builds with VSWITCH_SANITIZE=address,undefined. Unaligned accesses are meant to
# be: frames lie where guests put them, and x86 and AArch64 read them so.
SANITIZE = os.environ.get("VSWITCH_SANITIZE", "")
if SANITIZE:
    CFLAGS += [
        f"-fsanitize={SANITIZE}",
        "-fno-sanitize=alignment",
        "-fno-sanitize-recover=all",
        "-fno-omit-frame-pointer",
        "-O1",
        "-g",
    ]
    LDFLAGS += [f"-fsanitize={SANITIZE}"]

DIRECTIVES = {
    "language_level": "3",
    "boundscheck": False,
    "wraparound": False,
    "cdivision": True,
    "initializedcheck": False,
    "embedsignature": True,
    "freethreading_compatible": True,
}


HEADERS = {
    "vswitch/fastpath": [
        "vswitch/fastpath/atomics.h",
        "vswitch/fastpath/notify.h",
        "vswitch/fastpath/sigbus.h",
        "vswitch/fastpath/uring.h",
    ],
    "vswitch/guest": ["vswitch/guest/barriers.h"],
}


def extension(name: str) -> Extension:
    path = name.replace(".", "/")
    folder = path.rpartition("/")[0]
    return Extension(
        name,
        [path + ".pyx"],
        depends=HEADERS[folder],
        include_dirs=[folder],
        extra_compile_args=CFLAGS,
        extra_link_args=LDFLAGS,
    )


EXTENSIONS = [
    extension("vswitch.fastpath.engine"),
    extension("vswitch.fastpath.iotlb"),
    extension("vswitch.fastpath.joined"),
    extension("vswitch.fastpath.journal"),
    extension("vswitch.fastpath.mapping"),
    extension("vswitch.fastpath.port"),
    extension("vswitch.fastpath.pump"),
    extension("vswitch.fastpath.table"),
    extension("vswitch.fastpath.turns"),
    extension("vswitch.guest.driver"),
    extension("vswitch.guest.host_load"),
    extension("vswitch.guest.latency"),
    extension("vswitch.guest.limits"),
    extension("vswitch.guest.load"),
    extension("vswitch.guest.mapping"),
    extension("vswitch.guest.null_backend"),
    extension("vswitch.guest.probe"),
    extension("vswitch.guest.scribble"),
]

if METADATA.isdisjoint(sys.argv):
    # Else the compiler's log would have to be read for it, after a minute.
    if lacking := requirements.missing(requirements.COMPILE):
        names = ", ".join(one.what for one in lacking)
        sys.exit(f"error: missing: {names}\n  hint: {requirements.advice(lacking)}")
    EXTENSIONS = cythonize(EXTENSIONS, compiler_directives=DIRECTIVES)

setup(ext_modules=EXTENSIONS)
