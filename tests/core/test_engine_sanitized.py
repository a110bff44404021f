"""The engine that everybody uses, under the compiler's sanitizers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.support import embedded


@pytest.fixture(scope="module", params=[*embedded.SANITIZERS])
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    sanitizers: str = request.param
    if not embedded.library(sanitizers):
        pytest.skip(f"gcc has no library for -fsanitize={sanitizers}")
    return embedded.build(tmp_path_factory.mktemp("sanitized"), sanitizers), sanitizers


def test_its_own_tests(engine: tuple[Path, str]) -> None:
    file = "tests/unit/test_engine.py"
    tests = ["pytest", "-q", "-p", "no:cacheprovider", file]
    if engine[1] == "thread":  # it allows no threads in the child of a process with threads
        tests += ["--deselect", f"{file}::test_a_child_can_close_it_and_make_its_own"]
    done = embedded.run(*engine, tests)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="not root")
@pytest.mark.skipif(not Path("/dev/net/tun").exists(), reason="no /dev/net/tun")
def test_the_conformance_suite(engine: tuple[Path, str], tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    suite = ["vhostctl", "conformance", "--device", "engine", "--json", str(report)]
    done = embedded.run(*engine, suite, seconds=900)
    results = json.loads(report.read_text())["results"]
    assert [r for r in results if r["status"] not in ("pass", "n/a")] == [], done.stderr
    assert done.returncode == 0, done.stderr
    assert len(results) >= 150


def test_a_sanitizer_is_at_work(tmp_path: Path, engine: tuple[Path, str]) -> None:
    """A fault of the engine's own would not go unseen: its library is in the process."""
    folder, sanitizers = engine
    program = tmp_path / "who.py"
    program.write_text(
        "from vhostctl.engine import _native\n"
        "print(_native.__file__, open('/proc/self/maps').read())\n"
    )
    done = embedded.run(folder, sanitizers, [str(program)])
    assert done.stdout.startswith(str(folder)), done.stderr
    assert embedded.SANITIZERS[sanitizers].removesuffix(".so") in done.stdout
