"""Describe the compiled module of the driver half to cffi.

setuptools runs this file from the project's root and takes `ffi` from it, so it imports
nothing of the package that it helps to build. To build it otherwise, as the tests do:
`python vhostctl/guest/build.py FOLDER [COMPILER OPTION...]` puts the module below FOLDER.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from cffi import FFI

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parents[1]
_SOURCES = "vhostctl/guest/src"


def describe(root: Path, options: Iterable[str] = ()) -> FFI:
    """Return the module's description; its sources are named from `root`.

    `options` go to the compiler and to the linker.
    """
    folder = root / _SOURCES
    names = sorted(path.name for path in (_HERE / "src").iterdir())
    module = FFI()
    module.cdef((_HERE / "native.cdef").read_text(encoding="ascii"))
    module.set_source(
        "vhostctl.guest._native",
        """
        #include "endpoint.h"
        #include "forward.h"
        #include "patch.h"
        #include "pump.h"
        """,
        sources=[str(folder / name) for name in names if name.endswith(".c")],
        depends=[str(folder / name) for name in names if name.endswith(".h")],
        include_dirs=[str(folder)],
        extra_compile_args=["-O2", "-std=gnu11", "-Wall", "-Wextra", *options],
        extra_link_args=list(options),
    )
    return module


ffi = describe(Path())  # setuptools wants names from the project's root

if __name__ == "__main__":
    folder, *more = sys.argv[1:]
    describe(_ROOT, more).compile(tmpdir=folder, verbose=True)
