"""The C half against a C device in another thread, under the compiler's sanitizers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [
    ROOT / "tests/core/guest_rings.c",
    *(ROOT / "vhostctl/guest/src" / name for name in ("vring.c", "net.c", "pump.c")),
]
FLAGS = ["-g", "-O1", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-pthread"]


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
@pytest.mark.parametrize(("sanitizers", "frames"), [("address,undefined", 4000), ("thread", 4000)])
def test_rings_under_sanitizers(tmp_path: Path, sanitizers: str, frames: int) -> None:
    program = tmp_path / "rings"
    build = [
        "gcc",
        *FLAGS,
        f"-fsanitize={sanitizers}",
        "-fno-sanitize-recover=all",
        "-Wno-tsan",  # it does not model fences; every access that they order is atomic
        f"-I{ROOT / 'vhostctl/guest/src'}",
        *map(str, SOURCES),
        f"-o{program}",
    ]
    subprocess.run(build, check=True, timeout=120)
    # Some kernels place mappings where the thread sanitizer cannot follow.
    run = subprocess.run(
        ["setarch", "-R", program, str(frames)],
        check=False,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("rx: 4000 frames") == run.stdout.count("tx: 4000 frames") > 10
