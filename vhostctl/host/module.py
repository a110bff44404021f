"""What the running kernel says about itself and about its modules."""

from __future__ import annotations

import os
from pathlib import Path

_SYS_MODULE = Path("/sys/module")
DEFAULT_MAX_MEM_REGIONS = 64


def kernel_release() -> str:
    """Return the running kernel's release, as `uname -r` prints it."""
    return os.uname().release


def parameters(module: str) -> dict[str, str]:
    """Return the readable parameters of `module` by name; empty if it is not loaded."""
    found: dict[str, str] = {}
    directory = _SYS_MODULE / module / "parameters"
    if directory.is_dir():
        for path in sorted(directory.iterdir()):
            try:
                found[path.name] = path.read_text(encoding="ascii").strip()
            except OSError:
                continue  # write-only parameters, or ones only root may read
    return found


def max_mem_regions() -> int:
    """Return how many regions one memory table may have (vhost's parameter)."""
    value = parameters("vhost").get("max_mem_regions", "")
    return int(value) if value.isdigit() else DEFAULT_MAX_MEM_REGIONS
