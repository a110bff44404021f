"""The rules on the kernel's vhost-net and on our module, and the selftest on ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vm.conftest import LIMIT, run
from tests.vm.test_system import PYTEST, SKIPS, files
from vhostctl.kmod import NODE
from vhostctl.lab.kernels import Kernel
from vhostctl.lab.vm import Machine


@pytest.mark.vm
def test_the_rules_are_the_kernels(kernel: Kernel) -> None:
    outcome = run(Machine(kernel), ["sh", "-c", f"{PYTEST} {SKIPS} tests/conformance"], LIMIT)
    print(outcome)
    assert outcome.status == 0


@pytest.mark.vm
def test_our_module_keeps_them(kernel: Kernel, module: Path) -> None:
    suites = " ".join(["tests/conformance", *files("selftest changes load")])
    script = f'vhostctl kmod load "$1" && {PYTEST} {SKIPS} --device {NODE} {suites}'
    outcome = run(Machine(kernel), ["sh", "-c", script, "sh", str(module)], LIMIT)
    print(outcome)
    assert outcome.status == 0
