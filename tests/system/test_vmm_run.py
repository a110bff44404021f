"""`vhostctl vmm run` with a kernel of a few bytes: how it ends, what it leaves. Needs /dev/kvm."""

from __future__ import annotations

import json
import os
import pty
import random
import select
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.processes import ended, reached
from tests.support.realmode import open_kvm
from tests.support.vmm_hostile import RAM, Driver, GuestCpu
from tests.system.conftest import until
from tests.unit.test_vmm_boot import bzimage, header
from vhostctl.abi import virtio
from vhostctl.control.features import Policy, mask
from vhostctl.control.rings import place_rings
from vhostctl.host.links import exists
from vhostctl.host.listening import listening
from vhostctl.host.netns import NetNamespace
from vhostctl.jobs.vmm import Backend, Vm
from vhostctl.vmm.acpi import SLEEP_TYPE_OFF
from vhostctl.vmm.machine import MachineConfig
from vhostctl.vmm.netconfig import NetConfig

pytestmark = pytest.mark.usefixtures("kvm_is_there")

PATIENCE = 120
ENTRY = 0x200
HELLO = b"\xba\xf8\x03\x00\x00\xb0H\xee"  # mov edx, 0x3f8; mov al, 'H'; out dx, al
TYPED = b"\xba\xfd\x03\x00\x00\xec\xa8\x01\x74\xfb"  # mov edx, 0x3fd; until in al, dx; test al, 1
OFF = (
    b"\xba\x04\x06\x00\x00\xb8"  # mov edx, 0x604; mov eax, ...; out dx, ax; hlt
    + (SLEEP_TYPE_OFF << 10 | 1 << 13).to_bytes(4, "little")
    + b"\x66\xef\xf4"
)
RESET = b"\xb0\xfe\xe6\x64\xf4"  # mov al, 0xfe; out 0x64, al; hlt
TRIPLE_FAULT = b"\x31\xc0\x0f\x22\xd8"  # xor eax, eax; mov cr3, rax
FOREVER = b"\xeb\xfe"


@pytest.fixture(scope="module")
def kvm_is_there() -> Iterator[None]:
    with open_kvm() as system, system.create_vm():
        yield


class Runner:
    """The command in a namespace, with a kernel that is `code`."""

    def __init__(self, device: str, namespace: NetNamespace, folder: Path) -> None:
        self._device, self.namespace, self._folder = device, namespace, folder

    def kernel(self, code: bytes) -> Path:
        code = bytes(ENTRY) + code
        code += bytes(-len(code) % 16)
        return bzimage(self._folder, header(syssize=len(code) // 16, init_size=1 << 20), code)

    def command(self, code: bytes, *options: str) -> list[str]:
        words = ["vmm", "run", "--tap", "tap0", "--device", self._device, "--memory", "32"]
        return [
            sys.executable,
            "-m",
            "vhostctl",
            *words,
            "--kernel",
            str(self.kernel(code)),
            *options,
        ]

    def run(self, code: bytes, *options: str, shell: str = "") -> subprocess.CompletedProcess[str]:
        command = self.command(code, *options)
        if shell:
            command = ["sh", "-c", f'exec "$@" {shell}', "sh", *command]
        return self.namespace.run(
            lambda: subprocess.run(
                command, capture_output=True, text=True, timeout=PATIENCE, check=False
            )
        )

    @property
    def tap(self) -> bool:
        return self.namespace.run(lambda: exists("tap0"))


@pytest.fixture
def runner(device: str, namespace: NetNamespace, tmp_path: Path) -> Runner:
    return Runner(device, namespace, tmp_path)


@contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    master, slave = pty.openpty()
    try:
        yield master, slave
    finally:
        os.close(master)
        os.close(slave)


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        (OFF, 0, "the guest switched itself off; exits"),
        (RESET, 0, "the guest asked for a reset; exits"),
        (TRIPLE_FAULT, 1, "Error: vCPU 0: "),
    ],
    ids=["off", "reset", "triple fault"],
)
def test_how_a_guest_ends(runner: Runner, code: bytes, status: int, said: str) -> None:
    done = runner.run(HELLO + code)
    assert (done.returncode, done.stdout) == (status, "H"), done.stderr
    (line,) = done.stderr.split("\n", 1)[status == 0 :][0].splitlines()
    assert line.startswith(said)
    assert not runner.tap


@pytest.mark.parametrize("which", ["<&-", "<&- >&- 2>&-", ">/dev/full"])
def test_standard_streams_may_be_closed(runner: Runner, which: str) -> None:
    done = runner.run(HELLO + OFF, shell=which)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ("" if ">" in which else "H")


def test_a_socket_that_is_taken_is_noticed_before_the_guest_runs(
    runner: Runner, tmp_path: Path
) -> None:
    with listening(tmp_path / "qmp"):
        done = runner.run(HELLO + OFF, "--qmp", str(tmp_path / "qmp"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "somebody listens" in done.stderr
    assert done.stderr.count("\n") == 1


def test_ctrl_a_x_leaves(runner: Runner) -> None:
    with terminal() as (master, slave):
        before = termios.tcgetattr(slave)
        command = runner.command(HELLO + FOREVER)
        process = runner.namespace.run(lambda: subprocess.Popen(command, stdin=slave, stdout=slave))
        with ended(process) as p:
            until(lambda: bool(select.select([master], [], [], 0)[0]), "its output")
            assert os.read(master, 1) == b"H"
            until(lambda: termios.tcgetattr(slave) != before, "raw")
            time.sleep(0.1)
            os.write(master, b"\x01x")
            assert p.wait(PATIENCE) == 0
        assert termios.tcgetattr(slave) == before
    assert not runner.tap


@pytest.mark.parametrize(
    ("number", "qmp"), [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, False)]
)
def test_a_signal_at_any_moment(
    runner: Runner, number: signal.Signals, qmp: bool, tmp_path: Path
) -> None:
    """Also in the moment in which the terminal becomes raw, and the one behind that."""
    moments = random.Random(number)  # noqa: S311 -- moments
    command = runner.command(FOREVER, *["--qmp", str(tmp_path / "qmp")] * qmp)
    for attempt in range(3):
        with terminal() as (_, slave):
            before = termios.tcgetattr(slave)
            process = runner.namespace.run(
                lambda slave=slave: subprocess.Popen(  # type: ignore[misc]
                    command, stdin=slave, stdout=slave, stderr=subprocess.DEVNULL
                )
            )
            with ended(process):
                while termios.tcgetattr(slave) == before:
                    assert process.poll() is None
                if attempt:
                    time.sleep(moments.uniform(0, 0.02))
                process.send_signal(number)
                status = process.wait(PATIENCE)
            assert status == 128 + number or (qmp and status == 0)
            assert termios.tcgetattr(slave) == before
        assert not runner.tap
        assert not (tmp_path / "qmp").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_begins(runner: Runner, number: signal.Signals) -> None:
    command = runner.command(FOREVER)
    process = runner.namespace.run(lambda: subprocess.Popen(command, stdin=subprocess.DEVNULL))
    with ended(process):
        until(lambda: runner.tap, "its tap")
        process.send_signal(number)
        assert process.wait(PATIENCE) == 128 + number
    assert not runner.tap


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (OFF, {"guest": True, "reason": "guest-shutdown"}),
        (RESET, {"guest": True, "reason": "guest-reset"}),
        (TRIPLE_FAULT, {"guest": False, "reason": "host-error"}),
    ],
    ids=["off", "reset", "triple fault"],
)
def test_clients_hear_how_the_guest_ended(
    runner: Runner, code: bytes, told: dict[str, object], tmp_path: Path
) -> None:
    path = tmp_path / "qmp"
    command = runner.command(TYPED + code, "--qmp", str(path))
    process = runner.namespace.run(
        lambda: subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    )
    with ended(process), socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        until(lambda: reached(client, path), "the socket")
        with client.makefile("rw") as stream:
            assert "QMP" in json.loads(stream.readline())
            stream.write('{"execute": "qmp_capabilities"}\n')
            stream.flush()
            assert json.loads(stream.readline()) == {"return": {}}
            assert process.stdin is not None
            process.stdin.write(b"x")
            process.stdin.close()
            event = json.loads(stream.readline())
        assert (event["event"], event["data"]) == ("SHUTDOWN", told)
        assert process.wait(PATIENCE) == (told["reason"] == "host-error")


ASKED = virtio.VIRTIO_NET_S_ANNOUNCE


def start(vm: Vm) -> None:
    """Do what a driver does, up to DRIVER_OK."""
    (function,) = vm.machine.functions
    driver = Driver(GuestCpu(vm.machine, function))
    driver.come_home()
    driver.accept(function._transport.device.features)
    for queue, ring in enumerate(place_rings(RAM // 2, 5, 64)[0]):
        driver.place(queue, ring)
    driver.set("device_status", 15)
    assert driver.get("device_status") == 15


@pytest.mark.parametrize("started", [False, True], ids=["paused", "started"])
def test_the_card_is_the_same_after_a_resume(
    runner: Runner, device: str, started: bool, tmp_path: Path
) -> None:
    policy = Policy(refused=mask(virtio.VIRTIO_NET_F_MRG_RXBUF))
    net = NetConfig("02:00:00:00:00:07", 1400, 64, policy)
    backend, saved, kernel = Backend("tap0", device), tmp_path / "saved", runner.kernel(FOREVER)

    def seen(vm: Vm) -> tuple[object, ...]:
        (function,) = vm.machine.functions
        card = function._transport.device
        return vm.machine.running, card.features, card.queue_sizes, card.read_config(0, 12)

    def boot() -> tuple[object, ...]:
        config = MachineConfig(RAM)
        with Vm.boot(config, backend, print, net=net, queues=2, kernel=kernel) as vm:
            if started:
                start(vm)
            else:
                vm.machine.pause()
            before = seen(vm)
            vm.save(saved)
            return before

    def resume() -> tuple[object, ...]:
        with Vm.resume(saved, backend, print) as vm:
            return seen(vm)

    first = runner.namespace.run(boot)
    config = b"\2\0\0\0\0\7\1\0\2\0" + (1400).to_bytes(2, "little")
    assert (first[0], first[2], first[3]) == (started, [64] * 5, config)
    again = config[:6] + bytes([virtio.VIRTIO_NET_S_LINK_UP | ASKED * started]) + config[7:]
    assert runner.namespace.run(resume) == (*first[:3], again)
