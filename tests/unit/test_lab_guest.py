"""The conversation with a VM, spoken by a script in QEMU's place."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from vhostctl.errors import InvalidArgument
from vhostctl.lab import accel, compose, guest
from vhostctl.lab.accel import Accel
from vhostctl.lab.compose import Boot
from vhostctl.lab.kernels import Kernel
from vhostctl.lab.vm import LostMachineError, Machine, TimeLimitError

# What a booted guest does with its ports; the test's own lines come after it.
QEMU = """
import os, re, signal, socket, sys
ports = {name: socket.socket(fileno=int(fd)) for name, fd in (a.split("=") for a in sys.argv[2:])}
control, stdin, stdout, stderr = ports.values()
marker = re.search(r"marker='(.*)'", open(sys.argv[1] + "/setup").read())[1].encode()
def up(): control.send(b"up\\n")
def finish(status):
    control.send(b"exit %d\\n" % status)
    stdout.sendall(marker)
    stderr.sendall(marker)
    signal.pause()
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setenv("VHOSTCTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VHOSTCTL_ACCEL", "tcg")
    monkeypatch.setattr(compose, "OWN_DIRECTORIES", ())
    kernel = Kernel("6.1.0-56-amd64", tmp_path / "tree")
    kernel.modules.mkdir(parents=True)
    (kernel.modules / "modules.dep").touch()
    return Machine(kernel)


def speak(monkeypatch: pytest.MonkeyPatch, *scripts: str, boots: list[Boot] | None = None) -> None:
    """Let each boot be the next script."""
    left = list(scripts)

    def command(boot: Boot, ports: dict[str, int]) -> list[str]:
        if boots is not None:
            boots.append(boot)
        words = [f"{name}={fd}" for name, fd in ports.items()]
        return [sys.executable, "-c", QEMU + left.pop(0), str(boot.directory), *words]

    monkeypatch.setattr(compose, "qemu_command", command)


def run(
    machine: Machine, argv: Sequence[str] = ("true",), **options: object
) -> tuple[int, str, str]:
    out, err = bytearray(), bytearray()
    status = machine.run(argv, stdout=out.extend, stderr=err.extend, **options)  # type: ignore[arg-type]
    return status, out.decode(), err.decode()


def test_output_and_status_come_back(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    speak(monkeypatch, "up()\nstdout.sendall(b'o' * 300_000)\nstderr.send(b'e')\nfinish(7)")
    assert run(machine) == (7, "o" * 300_000, "e")


def test_the_guest_finds_its_orders(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    speak(
        monkeypatch, "up()\nstdout.sendall(open(sys.argv[1] + '/command', 'rb').read())\nfinish(0)"
    )
    text = run(machine, ["echo", "it's"], cwd=Path("/usr"), env={"OWN": "1"})[1]
    assert "export OWN=1\n" in text
    assert text.endswith("cd /usr || exit 126\nexec echo 'it'\"'\"'s'\n")


def test_counting_instructions_fixes_the_hash_seed(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    speak(
        monkeypatch, *["stdout.sendall(open(sys.argv[1] + '/command', 'rb').read())\nfinish(0)"] * 2
    )
    assert "PYTHONHASHSEED=0" in run(Machine(machine.kernel, icount=True))[1]
    assert "PYTHONHASHSEED" not in run(machine)[1]


def test_input_is_passed_on(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    speak(
        monkeypatch,
        "up()\nwhile data := stdin.recv(999): stdout.sendall(data)\nfinish(0)",
    )
    (tmp_path / "input").write_bytes(b"0123456789" * 20_000)
    with open(tmp_path / "input", "rb") as source:
        assert run(machine, stdin=source.fileno())[1] == "0123456789" * 20_000


def test_a_panic_is_a_lost_vm(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    speak(
        monkeypatch,
        "up()\nstdout.sendall(b'so far\\4')\n"
        "print('noise\\nKernel panic - not syncing: why\\nmore noise')",
    )
    out = bytearray()
    with pytest.raises(LostMachineError, match="while the command ran: Kernel panic") as caught:
        machine.run(["true"], stdout=out.extend)
    assert caught.value.started
    assert caught.value.console == ("noise", "Kernel panic - not syncing: why", "more noise")
    assert out == b"so far\4"


def test_qemus_own_complaint_is_the_reason(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    speak(monkeypatch, "print('qemu-system-x86_64: no memory', file=sys.stderr)")
    with pytest.raises(LostMachineError, match="while the kernel booted: qemu-system-x86_64: no m"):
        run(machine)


def test_the_console_is_passed_on(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    speak(monkeypatch, "print('booting', flush=True)\nup()\nfinish(0)")
    seen = bytearray()
    assert run(machine, console=seen.extend)[0] == 0
    assert seen == b"booting\n"


def test_the_time_limit_holds(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    speak(monkeypatch, "up()\nstdout.send(b'\\4')\nsignal.pause()")
    out = bytearray()
    started = time.monotonic()
    with pytest.raises(TimeLimitError, match="reached while the command ran"):
        machine.run(["true"], timeout=1.0, stdout=out.extend)
    assert time.monotonic() - started < 10
    assert out == b"\4", "what may have been the marker was output after all"


def test_output_that_never_ends_is_not_waited_for(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest, "_DRAIN_SECONDS", 0.2)
    speak(monkeypatch, "up()\nstdout.send(b'x')\ncontrol.send(b'exit 3\\n')\nsignal.pause()")
    assert run(machine) == (3, "x", "")


def test_whatever_is_raised_the_vm_is_gone(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    speak(monkeypatch, "up()\nstdout.send(b'%d' % os.getpid())\nsignal.pause()")
    seen: list[int] = []

    def sink(data: bytes) -> None:
        seen.append(int(data))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        machine.run(["true"], stdout=sink)
    with pytest.raises(ProcessLookupError):
        os.kill(seen[0], 0)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Make KVM open, with nothing known of it; return a list for notices."""
    (tmp_path / "kvm").touch()
    monkeypatch.setattr(accel, "_DEVICE", tmp_path / "kvm")
    monkeypatch.setenv("VHOSTCTL_ACCEL", "auto")
    return []


@pytest.mark.parametrize("under_kvm", ["signal.pause()", "sys.exit('cannot set MSR')"])
def test_a_kvm_that_does_not_boot_is_given_up(
    machine: Machine, untried: list[str], monkeypatch: pytest.MonkeyPatch, under_kvm: str
) -> None:
    monkeypatch.setattr(accel, "TRIAL_SECONDS", 0.5)
    boots: list[Boot] = []
    speak(monkeypatch, under_kvm, *["up()\nfinish(0)"] * 2, boots=boots)
    patient = Machine(machine.kernel, notice=untried.append)
    assert run(patient)[0] == 0
    assert run(patient)[0] == 0
    assert [boot.accel for boot in boots] == [Accel.TRIAL, Accel.TCG, Accel.TCG]
    assert untried == ["no VM comes up on this host's KVM; it is emulated, now and from now on"]


def test_a_kvm_that_boots_is_kept(
    machine: Machine, untried: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    boots: list[Boot] = []
    speak(monkeypatch, *["up()\nfinish(0)"] * 2, boots=boots)
    run(machine)
    run(machine)
    assert [boot.accel for boot in boots] == [Accel.TRIAL, Accel.KVM]
    assert untried == []


def test_a_trial_ends_when_the_guest_is_up(
    machine: Machine, untried: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hours = [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + 3600 * hours[0])
    monkeypatch.setattr(guest, "time", clock)
    speak(monkeypatch, "up()\nstdout.send(b'1')\nstdin.recv(1)\nfinish(0)")
    reader, writer = os.pipe()

    def an_hour_later(data: bytes) -> None:
        hours[0] += int(data)
        os.write(writer, b"x")

    try:
        status = machine.run(["true"], timeout=None, stdin=reader, stdout=an_hour_later)
    finally:
        os.close(reader)
        os.close(writer)
    assert status == 0
    assert untried == []


def test_a_crash_after_boot_is_not_kvms(
    machine: Machine, untried: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    speak(monkeypatch, "up()")
    with pytest.raises(LostMachineError):
        run(machine)
    assert untried == []


@pytest.mark.parametrize(
    "values",
    [
        {"cpus": 0},
        {"cpus": 2, "icount": True},
        {"memory": 100},
        {"share": (Path("nowhere"),)},
        {"share": (Path("/"),)},
    ],
)
def test_values_that_cannot_work_are_refused(machine: Machine, values: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument):
        Machine(machine.kernel, **values)  # type: ignore[arg-type]


def test_what_a_shell_cannot_say_is_refused(machine: Machine) -> None:
    with pytest.raises(InvalidArgument, match="no command"):
        machine.run([])
    with pytest.raises(InvalidArgument, match="'A B' cannot name"):
        machine.run(["true"], env={"A B": ""})


def test_a_shell_needs_a_terminal(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/null") as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        with pytest.raises(InvalidArgument, match="needs a terminal"):
            machine.shell(["sh"])
