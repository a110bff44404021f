"""`vhostctl kmod status` and the rest of the command line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from vhostctl.cli.main import main
from vhostctl.errors import StateError
from vhostctl.host import module
from vhostctl.kmod import building, loading, status


@pytest.fixture(autouse=True)
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand for /sys/module, /proc and the cache; /dev/null stands for the node."""
    (tmp_path / "tainted").write_text("12288\n")
    monkeypatch.setattr(status, "_SYS_MODULE", tmp_path / "module" / "vhost_net_mirror")
    monkeypatch.setattr(module, "_SYS_MODULE", tmp_path / "module")
    monkeypatch.setattr(status, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(status, "_NODE", tmp_path / "node")
    monkeypatch.setattr(status, "_TAINTED", tmp_path / "tainted")
    monkeypatch.setenv("VHOSTCTL_CACHE", str(tmp_path / "cache"))
    return tmp_path


def load_it(system: Path) -> None:
    files = {
        "version": "0.1.0",
        "srcversion": "ABC",
        "refcnt": "1",
        "taint": "OE",
        "parameters/max_mem_regions": "64",
        "holders/other": "",
    }
    for name, text in files.items():
        path = system / "module/vhost_net_mirror" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    (system / "node").symlink_to(os.devnull)
    for pid, comm, target in ((7, "qemu", os.devnull), (8, "cat", "/dev/zero"), (9, "gone", "/x")):
        descriptors = system / "proc" / str(pid) / "fd"
        descriptors.mkdir(parents=True)
        (descriptors / "3").symlink_to(target)
        (descriptors.parent / "comm").write_text(f"{comm}\n")


def invoke(*words: str) -> Result:
    return CliRunner().invoke(main, ["kmod", *words])


def test_a_loaded_module(system: Path) -> None:
    load_it(system)
    state = status.status()
    assert state == status.Status(
        kernel=os.uname().release,
        loaded=True,
        version="0.1.0",
        srcversion="ABC",
        parameters={"max_mem_regions": "64"},
        references=1,
        holders=("other",),
        users=((7, "qemu"),),
        taint="OE",
        tainted=12288,
        node=True,
    )
    table = invoke("status").stdout
    assert "7 (qemu)" in table
    assert "vhost_net_mirror.max_mem_regions" in table


def test_no_module() -> None:
    document = json.loads(invoke("status", "--json").stdout)
    assert document["schema"] == "vhostctl.kmod.status/1"
    assert (document["loaded"], document["node"], document["users"]) == (False, False, [])
    assert document["built"] == []
    assert Path(document["sources"], "Kbuild").is_file()
    assert invoke("status").exit_code == 0


@pytest.mark.parametrize(
    ("words", "path", "values"),
    [
        ([], None, {}),
        (["a=1", "b=c=d"], None, {"a": "1", "b": "c=d"}),
        (["x.ko", "a=1"], Path("x.ko"), {"a": "1"}),
    ],
)
def test_load_takes_a_file_and_parameters(
    monkeypatch: pytest.MonkeyPatch, words: list[str], path: Path | None, values: dict[str, str]
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(loading, "load", lambda *arguments: asked.append(arguments))
    assert invoke("load", *words).exit_code == 0
    assert asked == [(path, values)]


def test_unload_fails_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unload() -> None:
        raise StateError("vhost_net_mirror is not loaded")

    monkeypatch.setattr(loading, "unload", unload)
    result = invoke("unload")
    assert (result.exit_code, result.stderr) == (1, "Error: vhost_net_mirror is not loaded\n")


@pytest.mark.parametrize(
    ("words", "code", "match"),
    [
        (["build", "-k", "6.1", "--kernel-dir", "/x"], 2, "leave one out"),
        (["build", "-k", "6.1"], 3, "run vhostctl lab fetch 6.1"),
        (["build", "-k", "6.12"], 3, "run vhostctl lab fetch --headers 6.12"),
        (["build", "--kernel-dir", "/nonexistent"], 3, "has no Makefile"),
        (["load", "a.ko", "b.ko"], 2, "one module at a time"),
    ],
)
def test_what_cannot_work(system: Path, words: list[str], code: int, match: str) -> None:
    (system / "cache/kernels/6.12.117+deb12-amd64").mkdir(parents=True)
    result = invoke(*words)
    assert result.exit_code == code
    assert match in result.stderr.splitlines()[-1]


def test_build_prints_the_path(monkeypatch: pytest.MonkeyPatch, system: Path) -> None:
    place = system / "cache/headers/6.12.117+deb12-amd64/usr/src"
    (place / "linux-headers-6.12.117+deb12-amd64").mkdir(parents=True)
    (system / "cache/kernels/6.12.117+deb12-amd64").mkdir(parents=True)
    asked: list[Any] = []

    def fake(kernel_dir: Path, into: Path | None, **options: Any) -> Any:
        asked.append((kernel_dir.name, into, options["strict"], options["sparse"]))
        options["log"]("core/a.c:1: warning: x")
        return type("Built", (), {"path": "/made/it.ko"})

    monkeypatch.setattr(building, "build", fake)
    result = invoke("build", "-k", "6.12", "--strict")
    assert (result.stdout, result.stderr) == ("/made/it.ko\n", "core/a.c:1: warning: x\n")
    assert asked == [("linux-headers-6.12.117+deb12-amd64", None, True, False)]
