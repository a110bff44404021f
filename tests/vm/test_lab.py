"""The lab boots a real kernel, and what it promises about a VM holds."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from vhostctl.lab.kernels import Kernel
from vhostctl.lab.vm import LostMachineError, Machine, TimeLimitError

pytestmark = pytest.mark.vm

LIMIT = 300.0  # seconds; a boot takes about five on an idle machine
NASTY = """it's "$HOME" `id` \\ \n\t* é """ + "x" * 10_000


@pytest.fixture
def machine(kernel: Kernel) -> Machine:
    return Machine(kernel)


def run(
    machine: Machine, argv: Sequence[str], stdin: int | None = None
) -> tuple[int, bytes, bytes]:
    out, err = bytearray(), bytearray()
    status = machine.run(
        argv, cwd=Path("/"), timeout=LIMIT, stdin=stdin, stdout=out.extend, stderr=err.extend
    )
    return status, bytes(out), bytes(err)


SIGHTS = """
set -e
uname -r; pwd; id -u; printf '%s\\n' "$1"; cat
echo to stderr >&2; echo again >/dev/stdout
test -c /dev/net/tun; test -c /dev/vhost-net; modprobe dummy; test -d /sys/module/dummy
grep -qx 0x9 /sys/class/net/lo/flags; unshare -U true
touch "$2/shared"; touch "$3"; test -e "$3"; mkdir /usr/made
exit 7
"""


def test_a_command_in_its_machine(machine: Machine, tmp_path: Path) -> None:
    on_root = Path(__file__).with_name("written-by-the-guest")
    (tmp_path / "input").write_bytes(b"input\n")
    shared = Machine(machine.kernel, share=(tmp_path,))
    argv = ["sh", "-c", SIGHTS, "sh", NASTY, str(tmp_path), str(on_root)]
    with open(tmp_path / "input", "rb") as source:
        status, out, err = run(shared, argv, source.fileno())
    assert err == b"to stderr\n"
    assert out.decode() == f"{machine.kernel.release}\n/\n0\n{NASTY}\ninput\nagain\n"
    assert status == 7
    assert (tmp_path / "shared").exists()
    assert not on_root.exists()
    assert not Path("/usr/made").exists()


def test_much_output_and_a_signal(machine: Machine) -> None:
    script = "seq 1 200000; kill -9 $$"
    status, out, err = run(machine, ["sh", "-c", script])
    assert out == b"".join(b"%d\n" % number for number in range(1, 200_001))
    assert err == b""
    assert status == 128 + signal.SIGKILL


def test_a_panic_is_a_lost_vm(machine: Machine) -> None:
    script = "echo before; echo c >/proc/sysrq-trigger; echo after"
    out = bytearray()
    with pytest.raises(LostMachineError, match="Kernel panic") as caught:
        machine.run(["sh", "-c", script], cwd=Path("/"), timeout=LIMIT, stdout=out.extend)
    assert caught.value.started
    assert out == b"before\n"


def test_the_time_limit_holds(machine: Machine) -> None:
    with pytest.raises(TimeLimitError):
        machine.run(["sleep", "3600"], cwd=Path("/"), timeout=2.0)


LOOP = """
import time
def loop():
    for _ in range(200_000): pass
def once():
    start = time.monotonic_ns()
    loop()
    return time.monotonic_ns() - start
print(min(once() for _ in range(3)))
"""


def test_counted_time_is_the_same_in_each_boot(machine: Machine) -> None:
    counted = Machine(machine.kernel, icount=True)
    times = []
    for _ in range(2):
        status, out, err = run(counted, [sys.executable, "-I", "-S", "-c", LOOP])
        assert (status, err) == (0, b"")
        times.append(int(out))
    assert times[0] == pytest.approx(times[1], rel=0.001)


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [found for child in children for found in (int(child), *descendants(int(child)))]


def test_an_interrupt_leaves_no_qemu(machine: Machine) -> None:
    script = "echo up; exec tail -f /dev/null"
    words = ["lab", "run", "-k", machine.kernel.release, "--timeout", str(LIMIT), "--"]
    with subprocess.Popen(
        [sys.executable, "-m", "vhostctl", *words, "sh", "-c", script],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    ) as command:
        assert command.stdout is not None
        assert command.stdout.readline() == b"up\n"
        below = descendants(command.pid)
        assert any(b"qemu" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in below)
        command.send_signal(signal.SIGINT)
        assert command.wait(120) == 130
    assert not [pid for pid in below if Path(f"/proc/{pid}").exists()]
