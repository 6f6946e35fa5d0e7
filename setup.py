"""Builds the Cython extensions and the relay; all else of the package is in pyproject.toml."""

import os
import sys
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent))
from vswitch.lab import requirements

METADATA = {"egg_info", "dist_info", "sdist"}
"""What tells about the package, for which nothing is compiled."""

CFLAGS = ["-O3", "-fno-strict-aliasing", "-fno-plt", "-Wall", "-Wno-unused-function"]
# Whether gcc inlines a function of the fast path may not depend on how much else there is: it stops
# when a file has grown by 40 %, wherever it is then.
CFLAGS += ["--param=inline-unit-growth=1000"]
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


FASTPATH, GUEST = Path("vswitch/fastpath/sys"), Path("vswitch/lab/guest")
HEADERS = {
    "vswitch.fastpath": [FASTPATH],
    "vswitch.lab": [GUEST],
    "benchmarks": [GUEST],
    "tests": [FASTPATH, GUEST],
}
"""Where the C headers of a package's extensions are."""


def extension(name: str) -> Extension:
    folders = next(found for package, found in HEADERS.items() if name.startswith(package + "."))
    return Extension(
        name,
        [name.replace(".", "/") + ".pyx"],
        depends=sorted(str(path) for folder in folders for path in folder.glob("*.h")),
        include_dirs=[str(folder) for folder in folders],
        extra_compile_args=CFLAGS,
        extra_link_args=LDFLAGS,
    )


EXTENSIONS = [
    extension("vswitch.fastpath.main.ahead"),
    extension("vswitch.fastpath.main.engine"),
    extension("vswitch.fastpath.main.fdb"),
    extension("vswitch.fastpath.main.fdb_table"),
    extension("vswitch.fastpath.main.iotlb"),
    extension("vswitch.fastpath.main.joined"),
    extension("vswitch.fastpath.main.journal"),
    extension("vswitch.fastpath.main.mapping"),
    extension("vswitch.fastpath.main.network"),
    extension("vswitch.fastpath.main.parts"),
    extension("vswitch.fastpath.main.port"),
    extension("vswitch.fastpath.main.pump"),
    extension("vswitch.fastpath.main.ring"),
    extension("vswitch.fastpath.main.view"),
    extension("vswitch.fastpath.main.worker"),
    extension("vswitch.fastpath.shared.turns"),
    extension("vswitch.fastpath.shared.words"),
    extension("vswitch.lab.guest.driver"),
    extension("vswitch.lab.guest.mapping"),
    extension("vswitch.lab.load.latency"),
    extension("vswitch.lab.load.load"),
]

TOOLS = [
    extension("benchmarks.native.ceilings"),
    extension("benchmarks.native.host_load"),
    extension("benchmarks.native.null_backend"),
    extension("benchmarks.native.probe"),
    extension("tests.native.bitmaps"),
    extension("tests.native.lists"),
    extension("tests.native.scribble"),
]
"""What tests and benchmarks have for themselves: `build_tools` builds it, and no wheel has it."""

if METADATA.isdisjoint(sys.argv):
    # Else the compiler's log would have to be read for it, after a minute.
    if lacking := requirements.missing(requirements.COMPILE):
        names = ", ".join(one.what for one in lacking)
        sys.exit(f"error: missing: {names}\n  hint: {requirements.advice(lacking)}")
    EXTENSIONS = cythonize(EXTENSIONS, compiler_directives=DIRECTIVES)


class BuildExtensionsAndRelay(build_ext):
    """The extensions, and the program in vswitch/relay, which is started and not imported."""

    FOLDER = "vswitch/relay"

    def run(self) -> None:
        super().run()
        folder = Path(self.FOLDER)
        target = self.relay_path()
        sources = sorted(map(str, folder.glob("*.c")))
        newest = max(path.stat().st_mtime for path in folder.glob("*.[ch]"))
        if not self.force and target.exists() and target.stat().st_mtime >= newest:
            return
        flags = ["-O2", "-Wall", "-Wextra", "-pthread", "-fstack-protector-strong"]
        if SANITIZE:
            flags += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-g"]
        objects = self.compiler.compile(
            sources, output_dir=self.build_temp, extra_preargs=flags, include_dirs=[self.FOLDER]
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_executable(
            objects,
            target.name,
            output_dir=str(target.parent),
            extra_preargs=[*flags, "-Wl,-z,relro,-z,now"],
        )

    def relay_path(self) -> Path:
        inplace = self.inplace or getattr(self, "editable_mode", False)
        root = Path() if inplace else Path(self.build_lib)
        return root / self.FOLDER / "vswitch-relay"

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), str(self.relay_path())]


class BuildTools(build_ext):
    """The extensions of tests and benchmarks, each beside its source."""

    def finalize_options(self) -> None:
        self.distribution.ext_modules = cythonize(TOOLS, compiler_directives=DIRECTIVES, quiet=True)
        super().finalize_options()
        self.inplace = True


setup(
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": BuildExtensionsAndRelay, "build_tools": BuildTools},
)
