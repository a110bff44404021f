"""The device core against an enemy, plain and under the compiler's sanitizers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import embedded

CASES = [
    "traffic",
    "full_socket",
    "kept_frame",
    "failing_allocations",
    "failing_copies",
    "failing_sends",
    "flips",
    "vanishing_memory",
    "requests_under_load",
]
PROGRAM = "tests/core/hostile_cases.py"
SETTLE_CASES = ["let_go", "read_again", "count_drops", "hand_over_under_load"]
SETTLE_PROGRAM = "tests/core/settle_cases.py"


@pytest.fixture(scope="module", params=["", *embedded.SANITIZERS], ids=lambda name: name or "plain")
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    sanitizers: str = request.param
    if sanitizers and not embedded.library(sanitizers):
        pytest.skip(f"gcc has no library for -fsanitize={sanitizers}")
    return embedded.build(
        tmp_path_factory.mktemp("hostile"), sanitizers, embedded.HOSTILE
    ), sanitizers


@pytest.mark.parametrize(
    ("program", "case"),
    [(PROGRAM, case) for case in CASES] + [(SETTLE_PROGRAM, case) for case in SETTLE_CASES],
    ids=CASES + SETTLE_CASES,
)
def test_against_an_enemy(engine: tuple[Path, str], program: str, case: str) -> None:
    done = embedded.run(*engine, [program, case])
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"


def test_where_the_kernel_does_the_access(tmp_path: Path) -> None:
    """What machines other than x86-64 do: the same without handlers of signals."""
    folder = embedded.build(tmp_path, "", embedded.HOSTILE, embedded.PORTABLE)
    for case in ("traffic", "vanishing_memory"):
        done = embedded.run(folder, "", [PROGRAM, case])
        assert done.returncode == 0, done.stderr


def test_an_access_outside_of_memory_is_noticed(tmp_path: Path) -> None:
    """The enemy itself: without what it allows, every access is one too many."""
    program = tmp_path / "blind.py"
    program.write_text(
        "from tests.core import hostile_cases\n"
        "hostile_cases.enemy.hostile_allow = lambda *_: 0\n"
        "hostile_cases.traffic()\n"
    )
    folder = embedded.build(tmp_path / "engine", "", embedded.HOSTILE)
    done = embedded.run(folder, "", [str(program)])
    assert done.returncode != 0
    assert "accesses outside of memory" in done.stderr
