"""The tests that need a kernel of their own, run inside one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vm.conftest import LIMIT, ROOT, fetched, run
from vhostctl.lab.kernels import Kernel
from vhostctl.lab.vm import Machine

# Neither plugin is used there, and both take seconds to start under emulation.
PYTEST = "python -m pytest -p no:cacheprovider -p no:hypothesispytest -p no:xdist -q --durations=5"
SKIPS = "--allowed-skips /dev/null"  # a lab's kernel has everything

# A VM for each, so that two of them share the machine.
SUITES = {
    "sessions": "changes handover migrate negotiation peer_bugs session tap_queue vhost_requests",
    "commands": "missing run up",
    "selftest": "selftest",
    "memory": "address_space dirty_log iotlb",
    "traffic": "gso load multiqueue notifiers workers",
    "users": "broker doctor",
    "service": "service service_qmp",
    "machines": "kvm kvm_notifiers vmm_hostile vmm_net vmm_suspend",
    "vmm": "vmm_run vmm_wild",
}
# A command of a service starts an interpreter, which takes seconds there; CI has the engine.
LONG = ["service", "vmm"]
# A second CPU costs half as much again under the emulator, so it is for those that race with the
# kernel. Those with KVM must not have it: what patches the code of a kernel for the first VM and
# the last races there, and Linux 6.12 and 7.2 panic now and then, and so do their guests.
TWO_CPUS = ["traffic"]
WITH_KVM = ["machines", "vmm"]
COUNTED = "many"  # its figures are instructions


def files(suite: str) -> list[str]:
    return [f"tests/system/test_{name}.py" for name in suite.split()]


def test_every_file_is_run() -> None:
    named = sorted(file for suite in (*SUITES.values(), COUNTED) for file in files(suite))
    there = sorted((ROOT / "tests/system").glob("test_*.py"))
    assert named == [str(path.relative_to(ROOT)) for path in there]


@pytest.mark.vm
@pytest.mark.parametrize(
    "suite",
    [pytest.param(name, marks=[pytest.mark.soak] * (name in LONG)) for name in SUITES],
)
def test_a_suite_passes_in_a_vm(
    kernel: Kernel, module: Path, suite: str, request: pytest.FixtureRequest
) -> None:
    # With our module beside the kernel's: sessions move from one to the other.
    load = 'vhostctl kmod load "$1"; shift'
    if suite in WITH_KVM:
        load += "; modprobe -q kvm-amd || modprobe -q kvm-intel"
    kills = "export VHOSTCTL_TEST_KILLS=${VHOSTCTL_TEST_KILLS:-3}"
    script = f'{load}; {kills}; exec {PYTEST} {SKIPS} "$@"'
    marks = ["-m", str(request.config.getoption("markexpr"))]
    argv = ["sh", "-ec", script, "sh", str(module), *marks, *files(SUITES[suite])]
    outcome = run(Machine(kernel, 2 if suite in TWO_CPUS else 1), argv, LIMIT)
    print(outcome)
    assert outcome.status == 0
    assert " passed" in outcome.stdout


@pytest.mark.vm
def test_the_last_of_many_devices_costs_what_the_first_does() -> None:
    argv = ["sh", "-c", f"exec {PYTEST} -s {files(COUNTED)[0]}"]
    outcome = run(Machine(fetched("6.1"), icount=True), argv, 600)
    print(outcome)
    assert outcome.status == 0
