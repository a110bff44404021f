"""The doctor in VMs: faults of a whole machine, which no other test may share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.vm.conftest import run
from vhostctl.cli.exitcodes import ExitCode
from vhostctl.lab import process
from vhostctl.lab.kernels import Kernel
from vhostctl.lab.vm import Machine


def in_vm(kernel: Kernel, script: str, *words: str, append: str = "") -> Any:
    """Run a shell script; return the JSON that it printed."""
    argv = ["sh", "-ec", f"mount -t securityfs none /sys/kernel/security\n{script}", "sh", *words]
    outcome = run(Machine(kernel, append=append), argv, 600)
    print(outcome)
    assert outcome.status == 0
    return json.loads(outcome.stdout)


@pytest.mark.vm
def test_each_fault_is_found_and_gone_after_its_remedy(kernel: Kernel, module: Path) -> None:
    script = 'python -m tests.vm.doctor_faults all "$1"'
    seen = in_vm(kernel, script, str(module))
    assert len(seen) == 21
    assert {code for code, trial in seen.items() if trial["evidence"] is None} == set()
    assert {code for code, trial in seen.items() if trial["gone"] is False} == set()
    assert {code for code, trial in seen.items() if trial["gone"] is None} == {
        "VHOST-MODULE-DISABLED"
    }


BOOTS = {
    "module_blacklist=vhost_net": "VHOST-MODULE-CMDLINE",
    "module.sig_enforce=1": "VHOST-MODULE-SIGNED-ONLY",
    "lockdown=integrity": "VHOST-MODULE-SIGNED-ONLY",
    "nohz_full=1": "VHOST-BPF-NOHZ",
}
LOOK = 'python -m tests.vm.doctor_faults look "$@"'


@pytest.mark.vm
@pytest.mark.soak  # a boot for each fault
@pytest.mark.parametrize("append", BOOTS)
def test_a_boot_parameter_is_found(kernel: Kernel, append: str) -> None:
    assert in_vm(kernel, LOOK, BOOTS[append], append=append) == [BOOTS[append]]


@pytest.mark.vm
@pytest.mark.soak  # a boot for each fault
def test_a_boot_without_them_is_the_remedy(kernel: Kernel) -> None:
    assert in_vm(kernel, LOOK, *BOOTS.values()) == []


FIX = f"""
modprobe -r vhost_net
status=0
vhostctl doctor >&2 || status=$?
test $status = {ExitCode.DIFFERENT:d}
vhostctl doctor --fix --json
"""


@pytest.mark.vm
@pytest.mark.soak  # a boot for each fault
def test_fix_loads_the_module_and_the_exit_status_tells(kernel: Kernel) -> None:
    document = in_vm(kernel, FIX)
    commands = ("modprobe vhost_net", "modprobe tun")  # -r took what it needs, too
    assert document["repairs"] == [{"command": one, "failure": ""} for one in commands]
    assert not [one for one in document["findings"] if one["severity"] == "error"]
    assert document["means"][0] == {
        "name": "own the device",
        "works": True,
        "command": "vhostctl probe",
    }


@pytest.mark.vm
@pytest.mark.soak  # a boot for each fault
def test_a_profile_of_apparmor(kernel: Kernel) -> None:
    if shutil.which("apparmor_parser", path=process.search_path()) is None:
        pytest.skip("no apparmor_parser")
    said, left = in_vm(kernel, "python -m tests.vm.doctor_faults apparmor")
    assert "EACCES; security modules " in said
    assert said.endswith("/proc/self/attr/current: doctor-test (enforce)")
    assert left is None
