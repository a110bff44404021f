"""The rules on the kernel's vhost-net and on our module, and the selftest on ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vm.conftest import run
from vhostctl.kmod import NODE
from vhostctl.lab.kernels import Kernel
from vhostctl.lab.vm import Machine

SECONDS = 1500
PYTEST = "python -m pytest -p no:cacheprovider -p no:hypothesispytest -q --durations=5"
SKIPS = "--allowed-skips .ci/allowed-skips.txt"


@pytest.mark.vm
def test_the_rules_are_the_kernels(kernel: Kernel) -> None:
    outcome = run(Machine(kernel), ["sh", "-c", f"{PYTEST} {SKIPS} tests/conformance"], SECONDS)
    print(outcome)
    assert outcome.status == 0


@pytest.mark.vm
def test_our_module_keeps_them(kernel: Kernel, module: Path) -> None:
    suites = "tests/conformance tests/system/test_selftest.py"
    script = f'vhostctl kmod load "$1" && {PYTEST} {SKIPS} --device {NODE} {suites}'
    outcome = run(Machine(kernel), ["sh", "-c", script, "sh", str(module)], SECONDS)
    print(outcome)
    assert outcome.status == 0
