"""The tests that need a kernel of their own, run inside one."""

from __future__ import annotations

import pytest

from tests.vm.conftest import run
from vhostctl.lab.kernels import Kernel
from vhostctl.lab.vm import Machine

SUITE = "tests/system"


@pytest.mark.vm
def test_the_system_suite_passes_in_a_vm(kernel: Kernel) -> None:
    # Neither plugin is used there, and both take seconds to start under emulation.
    options = ["-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-q", "--durations=5"]
    skips = ["--allowed-skips", ".ci/allowed-skips.txt"]
    outcome = run(Machine(kernel), ["python", "-m", "pytest", *options, *skips, SUITE], 1500)
    print(outcome)
    assert outcome.status == 0
    assert " passed" in outcome.stdout
