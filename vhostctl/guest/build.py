"""Describe the compiled module of the driver half to cffi.

setuptools runs this file from the project's root and takes `ffi` from it, so it imports
nothing of the package that it helps to build.
"""

from __future__ import annotations

from pathlib import Path

from cffi import FFI

_HERE = Path(__file__).resolve().parent
_SOURCES = "vhostctl/guest/src"

ffi = FFI()
ffi.cdef((_HERE / "native.cdef").read_text(encoding="ascii"))
ffi.set_source(
    "vhostctl.guest._native",
    """
    #include "endpoint.h"
    #include "forward.h"
    #include "pump.h"
    """,
    sources=[f"{_SOURCES}/{path.name}" for path in sorted((_HERE / "src").glob("*.c"))],
    depends=[f"{_SOURCES}/{path.name}" for path in sorted((_HERE / "src").glob("*.h"))],
    include_dirs=[_SOURCES],
    extra_compile_args=["-O2", "-std=gnu11", "-Wall", "-Wextra"],
)

if __name__ == "__main__":
    ffi.compile(verbose=True)
