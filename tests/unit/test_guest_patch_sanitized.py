"""The tests of the patch, on a driver half that is built with the compiler's sanitizers."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.support import embedded, guest_build

SANITIZERS = "address,undefined"
TESTS = [
    f"tests/unit/test_guest_{name}.py" for name in ("patch", "patch_pairs", "forward", "faults")
]


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_patch_and_forwarder_under_sanitizers(tmp_path: Path) -> None:
    library = embedded.library(SANITIZERS)
    assert library, "the compiler has no sanitizers"
    options = [f"-fsanitize={SANITIZERS}", "-g", "-O1", "-fno-sanitize-recover=all"]
    folder = guest_build.build(tmp_path, *options)
    environment = os.environ | {
        "LD_PRELOAD": library,
        # The interpreter itself keeps memory to its end.
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    done = guest_build.run(folder, ["-q", *TESTS], environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
