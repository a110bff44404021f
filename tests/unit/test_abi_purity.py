"""The ABI layer is data: it may import what describes data, and nothing that does I/O."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import vhostctl.abi

ALLOWED = {"__future__", "ctypes", "dataclasses", "enum", "ioctl_opt"}
OURS = ("vhostctl.abi", "vhostctl.errors")
SOURCES = sorted(Path(vhostctl.abi.__file__).parent.glob("*.py"))


def imported(source: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_abi_imports_data_only(source: Path) -> None:
    foreign = {name for name in imported(source) - ALLOWED if not name.startswith(OURS)}
    assert not foreign
