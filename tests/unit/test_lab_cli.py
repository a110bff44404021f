"""`vhostctl lab`: options, exit statuses, what is printed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from vhostctl.cli.main import main
from vhostctl.errors import EnvironmentMissing
from vhostctl.lab import kernels
from vhostctl.lab.vm import LostMachineError, Machine, TimeLimitError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Hold one kernel in a cache of the test's own."""
    monkeypatch.setenv("VHOSTCTL_CACHE", str(tmp_path))
    (tmp_path / "kernels" / "6.12.117+deb12-amd64").mkdir(parents=True)
    return tmp_path


def invoke(*words: str) -> Result:
    return CliRunner().invoke(main, ["lab", *words])


def runs(monkeypatch: pytest.MonkeyPatch, outcome: int | BaseException) -> list[dict[str, Any]]:
    """Let every machine end like this; return what was asked of it."""
    calls: list[dict[str, Any]] = []

    def run(machine: Machine, argv: Sequence[str], **options: Any) -> int:
        calls.append({"machine": machine, "argv": argv, **options})
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(Machine, "run", run)
    return calls


LOST = LostMachineError("the VM was lost", started=True, console=("one", "two"))


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (0, 0),
        (7, 7),
        (137, 137),
        (TimeLimitError("the time limit was reached"), 124),
        (LOST, 125),
        (EnvironmentMissing("no QEMU"), 3),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_statuses(
    monkeypatch: pytest.MonkeyPatch, outcome: int | BaseException, status: int
) -> None:
    runs(monkeypatch, outcome)
    result = invoke("run", "-k", "6.12", "--", "true")
    assert result.exit_code == status
    if isinstance(outcome, Exception):
        assert f"Error: {outcome}" in result.stderr.splitlines()


def test_a_lost_vm_shows_the_end_of_its_console_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runs(monkeypatch, LOST)
    assert invoke("run", "-k", "6.12", "true").stderr == "one\ntwo\nError: the VM was lost\n"
    assert invoke("run", "-k", "6.12", "-v", "true").stderr == "Error: the VM was lost\n"


def test_options_reach_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = runs(monkeypatch, 0)
    words = ["-k", "6.12", "--cpus", "1", "--memory", "1G", "--icount", "--timeout", "9"]
    words += ["--append", "slub_debug=FZ quiet"]
    result = invoke(
        "run", *words, "--share", str(tmp_path), "--accel", "tcg", "ls", "-k", "--", "x"
    )
    assert result.exit_code == 0, result.output
    machine: Machine = calls[0]["machine"]
    assert (machine.kernel.series, machine.cpus, machine.memory) == ("6.12", 1, 1024)
    assert (machine.icount, machine.accel, machine.share) == (True, "tcg", (tmp_path,))
    assert machine.append == "slub_debug=FZ quiet"
    assert calls[0]["argv"] == ("ls", "-k", "--", "x")
    assert calls[0]["timeout"] == 9


@pytest.mark.parametrize(("text", "size"), [("512", 512), ("512M", 512), ("2g", 2048)])
def test_memory_sizes(monkeypatch: pytest.MonkeyPatch, text: str, size: int) -> None:
    calls = runs(monkeypatch, 0)
    assert invoke("run", "-k", "6.12", "--memory", text, "true").exit_code == 0
    assert calls[0]["machine"].memory == size


@pytest.mark.parametrize(
    "words",
    [
        ["run", "-k", "6.12"],
        ["run", "true"],
        ["run", "-k", "5.4", "true"],
        ["run", "-k", "6.12", "--memory", "1T", "true"],
        ["run", "-k", "6.12", "--memory", "64", "true"],
        ["run", "-k", "6.12", "--icount", "--cpus", "2", "true"],
        ["run", "-k", "6.12", "--timeout", "0", "true"],
        ["run", "-k", "6.12", "--share", "/no/such/directory", "true"],
        ["run", "-k", "6.12", "--append", "quiet -- init", "true"],
        ["shell", "-k", "6.12"],
        ["fetch"],
        ["fetch", "5.4"],
    ],
)
def test_wrong_usage(words: list[str]) -> None:
    result = invoke(*words)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("Error: ")


def test_a_kernel_that_was_not_fetched() -> None:
    result = invoke("run", "-k", "7.2", "true")
    assert result.exit_code == 3
    assert result.stderr.endswith("; run vhostctl lab fetch 7.2\n")


def test_list(cache: Path) -> None:
    document = json.loads(invoke("list", "--json").stdout)
    release = "6.12.117+deb12-amd64"
    image = cache / "kernels" / release / "lib/modules" / release / "vmlinuz"
    missing = {"release": None, "path": None, "image": None, "fetched": False, "headers": False}
    assert document["schema"] == "vhostctl.lab.list/1"
    assert document["kernels"] == [
        {
            "series": "6.12",
            "release": release,
            "path": str(cache / "kernels" / release),
            "image": str(image),
            "fetched": True,
            "headers": False,
        },
        {"series": "6.1", **missing},
        {"series": "7.2", **missing},
    ]
    table = invoke("list").stdout
    assert "6.12.117+deb12-amd64" in table
    assert table.count("not fetched") == 2


def test_fetch_says_where(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    def fetch(*series: str, with_headers: bool, progress: Any) -> list[kernels.Kernel]:
        assert not with_headers
        progress("package index", 50.0)
        return [kernels.find(name) for name in series]

    monkeypatch.setattr(kernels, "fetch", fetch)
    result = invoke("fetch", "6.12")
    assert result.stdout == f"6.12: 6.12.117+deb12-amd64 in {cache}/kernels/6.12.117+deb12-amd64\n"
    assert result.stderr == ""


def test_fetch_missing_passes_over_what_is_there(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    asked: list[tuple[str, bool]] = []

    def fetch(*series: str, with_headers: bool, progress: Any) -> list[kernels.Kernel]:  # noqa: ARG001
        asked.extend((name, with_headers) for name in series)
        return []

    monkeypatch.setattr(kernels, "fetch", fetch)
    assert invoke("fetch", "--missing", "6.12").exit_code == 0
    assert asked == []
    invoke("fetch", "--missing", "6.12", "7.2")
    assert asked == [("7.2", False)]

    asked.clear()
    invoke("fetch", "--missing", "--headers", "6.12")
    assert asked == [("6.12", True)]
    (cache / "headers" / "6.12.117+deb12-amd64").mkdir(parents=True)
    invoke("fetch", "--missing", "--headers", "6.12")
    assert asked == [("6.12", True)]
