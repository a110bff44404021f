"""The bench's marks, in instructions a frame, on Linux 6.1 with one CPU."""

from __future__ import annotations

import json

import pytest

from tests.vm.conftest import fetched, run
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
