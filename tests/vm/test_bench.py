"""What a frame costs, in instructions, on Linux 6.1 with one CPU: marks, and our module's worker
against the kernel's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.vm.conftest import fetched, module_for, run
from vhostctl.host.vhost import DEFAULT_PATH
from vhostctl.kmod import NODE
from vhostctl.lab.vm import Machine

# dpdk-testpmd with net_virtio_user on /dev/vhost-net, counted the same way.
PEER = {"tx": {"all": 8850, "worker": 3600}, "rx": {"all": 8270, "worker": 2780}}
SHARE_OF_ALL = 0.6


@pytest.mark.vm
def test_a_frame_costs_at_most_what_it_should() -> None:
    machine = Machine(fetched("6.1"), icount=True)
    script = "modprobe pktgen && vhostctl bench --seconds 1 --frame 64 --json"
    outcome = run(machine, ["sh", "-c", script], 600)
    assert outcome.status == 0, outcome
    results = {result["direction"]: result for result in json.loads(outcome.stdout)["results"]}
    for direction, peer in PEER.items():
        result = results[direction]
        print(direction, result)
        assert result["frames"] > 10_000
        assert result["all_ns_per_frame"] <= SHARE_OF_ALL * peer["all"]
        assert 0 < result["worker_ns_per_frame"] <= peer["worker"]
        assert result["driver_ns_per_frame"] < result["all_ns_per_frame"]


@pytest.mark.vm
@pytest.mark.parametrize("size", [64, pytest.param(1500, marks=pytest.mark.soak)])
def test_our_worker_costs_no_more_than_the_kernels(modules: Path, size: int) -> None:
    kernel = fetched("6.1")
    bench = f"vhostctl bench --seconds 0.5 --frame {size} --json --device"
    script = f'modprobe pktgen; vhostctl kmod load "$1"; {bench} {DEFAULT_PATH}; {bench} {NODE}'
    argv = ["sh", "-ec", script, "sh", str(module_for(kernel, modules))]
    outcome = run(Machine(kernel, icount=True), argv, 900)
    assert outcome.status == 0, outcome
    decoder, rest, costs = json.JSONDecoder(), outcome.stdout.strip(), []
    while rest:
        document, end = decoder.raw_decode(rest)
        costs.append({r["direction"]: r["worker_ns_per_frame"] for r in document["results"]})
        rest = rest[end:].strip()
    theirs, ours = costs
    print(theirs, ours)
    for direction, cost in theirs.items():
        assert 0 < ours[direction] <= cost
