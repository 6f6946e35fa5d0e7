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


def extension(name: str) -> Extension:
    return Extension(
        name,
        [name.replace(".", "/") + ".pyx"],
        depends=["vswitch/fastpath/atomics.h"],
        include_dirs=["vswitch/fastpath"],
        extra_compile_args=CFLAGS,
    )


EXTENSIONS = [
    extension("vswitch.fastpath.engine"),
    extension("vswitch.fastpath.mapping"),
    extension("vswitch.fastpath.port"),
    extension("vswitch.fastpath.table"),
]

setup(ext_modules=cythonize(EXTENSIONS, compiler_directives=DIRECTIVES))
