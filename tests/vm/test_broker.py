"""The broker in a VM: a user in no special group runs QEMU with the kernel's vhost-net."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.vm.conftest import run
from tests.vm.tcp_qemu import FALLBACK
from vhostctl.cli.exitcodes import ExitCode
from vhostctl.lab.kernels import Kernel
from vhostctl.lab.vm import Machine

REASONS = {
    "tap": "no rule for nobody (uid 65534) names tap eth7",
    "bridge": "allow[0]: bridges has br0, not br1",
    "queues": "allow[0]: max_queues is 1, not 2",
    "device": "allow[0]: devices has /dev/vhost-net, not /dev/vhost-net-mirror",
    "count": "allow[0]: per_user is 1, and 1 are there",
    "user": "no rule names uid 60001",
}


@pytest.fixture
def report(kernel: Kernel) -> dict[str, Any]:
    """What tests/vm/broker_qemu.py saw."""
    outcome = run(Machine(kernel, 1), ["python", "-m", "tests.vm.broker_qemu"], 600)
    print(outcome)
    assert outcome.status == 0
    document: dict[str, Any] = json.loads(outcome.stdout)
    return document


@pytest.mark.vm
def test_an_unprivileged_user_runs_qemu_with_vhost(report: dict[str, Any]) -> None:
    assert report["by hand"] != 0
    assert report["qemu"] == {
        "name": "qemu-system-x86",
        "uids": ["65534"] * 4,
        "groups": [],
        "capabilities": 0,
        "devices": 1,
        "bridge": "br0",
        "alias": "vhostctl broker: uid 65534",
    }
    assert report["frames"] > 0
    assert len(report["workers"]) == 1
    assert report["workers"][0] > 0
    assert FALLBACK not in report["errors"]
    assert report["status"] == ExitCode.OK

    _, granted, *refused = report["log"]
    assert granted.startswith("granted to nobody (uid 65534), pid ")
    assert granted.endswith(": tap vm-0 (made), on bridge br0, 1 x /dev/vhost-net")
    assert set(report["refused"]) == set(REASONS)
    for (kind, answer), line in zip(report["refused"].items(), refused, strict=True):
        assert answer["status"] == ExitCode.MISSING
        assert answer["stderr"].startswith(
            f"Error: {REASONS[kind]}; have the broker's policy changed"
        )
        assert line.startswith("refused to ")
        assert REASONS[kind] in line
