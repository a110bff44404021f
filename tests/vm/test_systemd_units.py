"""The units in a VM, under a systemd that holds the services to them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vm.conftest import run
from vhostctl.lab.kernels import Kernel
from vhostctl.lab.vm import Machine

SYSTEMD = Path("/lib/systemd/systemd")
NET_ADMIN, NET_RAW, BPF = 1 << 12, 1 << 13, 1 << 39  # linux/capability.h
RESTRICTED = "CapEff {0:016x} CapBnd {0:016x} NoNewPrivs 1 Seccomp 2"  # 2: a filter


@pytest.mark.vm
@pytest.mark.skipif(not SYSTEMD.exists(), reason=f"no {SYSTEMD}: apt install systemd")
def test_both_services_do_their_work_with_what_the_units_leave_them(kernel: Kernel) -> None:
    outcome = run(Machine(kernel, 1), ["sh", "tests/vm/systemd_units.sh"], 900)
    print(outcome)
    assert outcome.status == 0
    user, *handed, broker, first, second, service = outcome.stdout.splitlines()
    assert user == "user 65534"
    assert handed == ["/dev/net/tun"] * 2 + ["/dev/vhost-net"] * 2
    assert broker.split() == ["broker", *RESTRICTED.format(NET_ADMIN).split()]
    assert first == second == "1 packets transmitted, 1 packets received, 0% packet loss"
    assert service.split() == ["service", *RESTRICTED.format(NET_ADMIN | NET_RAW | BPF).split()]
