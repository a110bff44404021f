"""The workers of a running QEMU: named, pinned and moved, as kernel threads and as its threads."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.vm.conftest import run
from vhostctl.lab.kernels import Kernel
from vhostctl.lab.vm import Machine

NODES = ["/dev/vhost-net", "/dev/vhost-net", "/dev/vhost-vsock"]


@pytest.mark.vm
def test_the_workers_of_a_qemu(kernel: Kernel) -> None:
    outcome = run(Machine(kernel, cpus=2), ["python", "-m", "tests.vm.workers_qemu"], 400)
    print(outcome)
    assert outcome.status == 0
    said = json.loads(outcome.stdout)
    kinds = ["kthread"] if kernel.release.startswith("6.1.") else ["kthread", "task"]
    assert [report["kind"] for report in said["reports"]] == kinds
    for report in said["reports"]:
        check(report)
    assert (said["after"]["workers"], said["after"]["unserved"]) == ([], [])


def check(report: dict[str, Any]) -> None:
    pid, workers = report["pid"], report["listed"]["workers"]
    assert len(workers) == len(NODES)
    for place, worker in enumerate(workers):
        assert (worker["kind"], worker["name"]) == (report["kind"], f"vhost-{pid}")
        assert worker["owner"] == {"pid": pid, "command": "qemu-system-x86"}
        assert [candidate["path"] for candidate in worker["candidates"]] == NODES
        assert worker["likely"] == worker["candidates"][place]["fd"]
        assert not worker["certain"]
    assert report["listed"]["unserved"] == []
    assert [worker["cpus"] for worker in report["pinned"]["workers"]] == ["1"] * len(NODES)
    assert [worker["cgroup"] for worker in report["moved"]["workers"]] == ["/vhost"]
    assert report["proc"] == {
        "before": ["Cpus_allowed_list:\t0-1", "0::/"],
        "after": ["Cpus_allowed_list:\t1", "0::/vhost"],
        "qemu": ["Cpus_allowed_list:\t0-1", "0::/"],
    }
