"""The workers of a running QEMU: named, pinned and moved, as kernel threads and as its threads."""

from __future__ import annotations

import json

import pytest

from tests.vm.conftest import run
from vhostctl.lab.kernels import Kernel
from vhostctl.lab.vm import Machine

NODES = ["/dev/vhost-net", "/dev/vhost-net", "/dev/vhost-vsock"]


# The module's parameter makes kernel threads of them on newer kernels too; Linux 6.1 ignores it.
@pytest.mark.vm
@pytest.mark.parametrize("append", ["", "vhost.fork_from_owner_default=0"])
def test_the_workers_of_a_qemu(kernel: Kernel, append: str) -> None:
    machine = Machine(kernel, cpus=2, append=append)
    outcome = run(machine, ["python", "-m", "tests.vm.workers_qemu"], 300)
    print(outcome)
    assert outcome.status == 0
    report = json.loads(outcome.stdout)
    pid, workers = report["pid"], report["listed"]["workers"]
    if append:
        assert report["kind"] == "kthread"

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
    assert (report["after"]["workers"], report["after"]["unserved"]) == ([], [])
