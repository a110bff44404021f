"""The rules on the kernel's vhost-net and on our module, and the selftest on ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vm.conftest import LIMIT, run
from tests.vm.test_system import PYTEST, SKIPS, files
from vhostctl.kmod import NODE
from vhostctl.lab.kernels import Kernel
from vhostctl.lab.vm import Machine

ON_OURS = (
    "address_space dirty_log gso handover iotlb multiqueue negotiation notifiers peer_bugs"
    " selftest session vmm_hostile vmm_net"
)


@pytest.mark.vm
def test_the_rules_are_the_kernels(kernel: Kernel) -> None:
    argv = ["sh", "-c", f"{PYTEST} {SKIPS} tests/conformance"]
    outcome = run(Machine(kernel, 1), argv, LIMIT)
    print(outcome)
    assert outcome.status == 0


@pytest.mark.vm
@pytest.mark.parametrize(
    ("suites", "cpus"),
    [
        pytest.param(["tests/conformance"], 1, id="rules"),
        pytest.param(files("changes load"), 2, id="load"),
        pytest.param(files(ON_OURS), 1, id="sessions", marks=pytest.mark.soak),
    ],
)
def test_our_module_keeps_them(kernel: Kernel, module: Path, suites: list[str], cpus: int) -> None:
    script = f'vhostctl kmod load "$1" && {PYTEST} {SKIPS} --device {NODE} {" ".join(suites)}'
    outcome = run(Machine(kernel, cpus), ["sh", "-c", script, "sh", str(module)], LIMIT)
    print(outcome)
    assert outcome.status == 0
