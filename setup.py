"""Builds the Cython extensions; everything else about the package is in pyproject.toml."""

from Cython.Build import cythonize
from setuptools import Extension, setup

CFLAGS = ["-O3", "-fno-strict-aliasing", "-fno-plt", "-Wall", "-Wno-unused-function"]

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
    )


EXTENSIONS = [
    extension("vswitch.fastpath.engine"),
    extension("vswitch.fastpath.iotlb"),
    extension("vswitch.fastpath.journal"),
    extension("vswitch.fastpath.mapping"),
    extension("vswitch.fastpath.port"),
    extension("vswitch.fastpath.table"),
    extension("vswitch.guest.driver"),
    extension("vswitch.guest.host_load"),
    extension("vswitch.guest.latency"),
    extension("vswitch.guest.limits"),
    extension("vswitch.guest.load"),
    extension("vswitch.guest.mapping"),
    extension("vswitch.guest.null_backend"),
    extension("vswitch.guest.probe"),
]

setup(ext_modules=cythonize(EXTENSIONS, compiler_directives=DIRECTIVES))
