"""Tests here boot virtual machines from the host."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from vhostctl.errors import EnvironmentMissing
from vhostctl.kmod import NAME, building
from vhostctl.lab import headers, kernels
from vhostctl.lab.kernels import Kernel
from vhostctl.lab.vm import Machine

ROOT = Path(__file__).parents[2]
LIMIT = int(os.environ.get("VHOSTCTL_TEST_LIMIT", "1500"))
"""Seconds that one suite may take in its VM."""

SERIES = os.environ.get("VHOSTCTL_TEST_KERNELS", "6.1").split()


def fetched(series: str) -> Kernel:
    try:
        return kernels.find(series)
    except EnvironmentMissing as missing:
        pytest.skip(str(missing))


@pytest.fixture(params=SERIES)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    """Each kernel under test in turn."""
    return fetched(str(request.param))


@pytest.fixture(scope="session")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("modules")


def module_for(kernel: Kernel, modules: Path) -> Path:
    """The mirror module for `kernel`, built once and without a warning."""
    path = modules / kernel.release / f"{NAME}.ko"
    if not path.exists():
        building.build(headers_of(kernel), path.parent, strict=True)
    return path


@pytest.fixture
def module(kernel: Kernel, modules: Path) -> Path:
    """The mirror module for the kernel under test."""
    return module_for(kernel, modules)


def headers_of(kernel: Kernel) -> Path:
    try:
        return headers.find(kernel.release)
    except EnvironmentMissing as missing:
        pytest.skip(str(missing))


@dataclass(frozen=True)
class Outcome:
    status: int
    stdout: str
    stderr: str

    def __str__(self) -> str:
        return f"status {self.status}\n{self.stdout}\n{self.stderr}"


def search_path() -> str:
    """PATH with the interpreter of this run, and so its vhostctl, first."""
    return f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def run(machine: Machine, argv: Sequence[str], timeout: float) -> Outcome:
    """Run `argv` in the checkout with our PATH, and what sets how long tests take."""
    out, error = bytearray(), bytearray()
    env = {name: value for name, value in os.environ.items() if name.startswith("VHOSTCTL_TEST_")}
    env["PATH"] = search_path()
    status = machine.run(
        argv, cwd=ROOT, env=env, timeout=timeout, stdout=out.extend, stderr=error.extend
    )
    return Outcome(status, out.decode(errors="replace"), error.decode(errors="replace"))
