"""Imports go one way, and each part of the house keeps to its job."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "vhostctl"

# What each part may import besides itself. The package's own __init__ is its face.
MAY = {
    "errors": set(),
    "config": {"errors"},
    "abi": {"errors"},
    "host": {"errors", "abi"},
    "guest": {"errors", "abi", "host"},
    "engine": {"errors", "abi", "host"},
    "control": {"errors", "abi", "host"},
    "jobs": {"errors", "abi", "host", "guest", "control", "vmm"},
    "conformance": {"errors", "abi", "host"},
    "lab": {"errors"},
    "kmod": {"errors", "host", "lab"},
    "service": {"errors", "config", "abi", "host", "guest", "control", "jobs", "vmm"},
    "broker": {"errors", "config", "abi", "host", "control"},
    "doctor": {"errors", "abi", "host", "control"},
    "vmm": {"errors", "abi", "host", "control"},
    "cli": {
        "errors",
        "config",
        "abi",
        "host",
        "guest",
        "control",
        "jobs",
        "conformance",
        "kmod",
        "lab",
        "service",
        "broker",
        "doctor",
        "vmm",
    },
    "__main__": {"cli"},
    "__init__": {"errors", "host", "guest", "control"},
}
# What reaches up all the same, inside a function: a VhostNet may be the one in this process.
UPWARDS = {("host/vhost.py", "engine")}
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def part(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse((PACKAGE / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            base = node.module or ""
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_go_one_way(path: Path) -> None:
    here = part(path)
    for name in imports(path):
        if name.startswith("vhostctl."):
            there = name.split(".")[1]
            may = there == here or there in MAY[here] or (str(path), there) in UPWARDS
            assert may, f"{path} imports {name}"


@pytest.mark.parametrize(("path", "there"), sorted(UPWARDS))
def test_what_reaches_up_does_so_when_it_is_called(path: str, there: str) -> None:
    tree = ast.parse((PACKAGE / path).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert there not in ast.unparse(node)


@pytest.mark.parametrize(
    ("module", "homes"),
    [
        ("fcntl", {"host/ioctl.py", "lab", "service/state.py"}),
        ("click", {"cli"}),
        ("pyroute2", {"host/links.py"}),
        ("vhostctl.guest._native", {"guest/driver.py"}),
        ("vhostctl.engine._native", {"engine/device.py"}),
        ("subprocess", {"lab", "kmod", "jobs/migrant.py", "cli/asking.py", "cli/doctor.py"}),
    ],
)
def test_some_modules_have_one_home(module: str, homes: set[str]) -> None:
    for path in MODULES:
        if module in set(imports(path)):
            assert str(path) in homes or part(path) in homes, f"{path} imports {module}"


def test_only_the_command_line_prints_or_exits() -> None:
    for path in MODULES:
        if part(path) in ("cli", "__main__"):
            continue
        for node in ast.walk(ast.parse((PACKAGE / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("print", "sys.exit", "exit"), path


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_no_validation_by_assert(path: Path) -> None:
    tree = ast.parse((PACKAGE / path).read_text(encoding="utf-8"))
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]
