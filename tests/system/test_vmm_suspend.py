"""A machine in a directory, and how machines end, with guests of a few bytes. Needs /dev/kvm."""

from __future__ import annotations

import base64
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from tests.support.realmode import CODE, COUNTER, PATIENCE, begin, open_kvm
from vhostctl.errors import KernelError, StateError, VhostctlError, kernel_error
from vhostctl.host.memory import MappedRegion
from vhostctl.vmm import layout, suspend
from vhostctl.vmm.machine import End, Machine, MachineConfig, fresh_ram
from vhostctl.vmm.net import NetDevice
from vhostctl.vmm.netconfig import NetState

pytestmark = pytest.mark.usefixtures("kvm_is_there", "nothing_left")

MEMORY = 2 << 20
COUNTING = b"\x66\xff\x06\x00\x20\xeb\xf9"  # inc dword [COUNTER], for ever
CONFIG = MachineConfig(memory=MEMORY, cpus=2)
RAM = AbstractContextManager[list[MappedRegion]]


@pytest.fixture(scope="module")
def kvm_is_there() -> None:
    open_kvm().close()


@contextmanager
def machine(config: MachineConfig = CONFIG, ram: RAM | None = None) -> Iterator[Machine]:
    with ram or fresh_ram(MEMORY) as regions, Machine(config, regions, lambda _: None) as made:
        if ram is None:
            with regions[0].view() as view:
                view[CODE : CODE + len(COUNTING)] = COUNTING
            begin(made.cpus[0].vcpu)
        yield made


@contextmanager
def saved(directory: Path) -> Iterator[Machine]:
    """The machine that `directory` has, paused."""
    state = suspend.MachineState.load(directory)
    with machine(state.config(), suspend.saved_ram(state, directory)) as made:
        suspend.restore(made, [], state)
        yield made


def run(made: Machine) -> None:
    made.start()
    made.resume()
    wait_for_progress(made)


def count(made: Machine) -> int:
    with made.ram[0].view() as view:
        return int.from_bytes(view[COUNTER : COUNTER + 4], "little")


def wait_for_progress(made: Machine) -> None:
    before, deadline = count(made), time.monotonic() + PATIENCE
    while count(made) == before:
        assert time.monotonic() < deadline, "the guest stands still"
        time.sleep(0.001)


def in_time(function: Callable[[], object]) -> None:
    """Fail if `function` does not return."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive()


class Nic:
    """A network card as `suspend.save` knows it, which may refuse to stop."""

    def __init__(self, made: Machine, error: Exception | None = None) -> None:
        self._machine = made
        self._error = error
        self.went_on: list[tuple[bool, bool]] = []

    def save(self) -> NetState:
        if self._error is not None:
            raise self._error
        return NetState(bytes(6), True, False, 1, 0, None, None, 0, 1, 256, None)

    def go_on(self) -> None:
        self.went_on.append((self._machine.lock._is_owned(), self._moves()))  # type: ignore[attr-defined]

    def _moves(self) -> bool:
        before = count(self._machine)
        time.sleep(0.01)
        return count(self._machine) != before


@pytest.mark.parametrize("paused", [False, True], ids=["running", "paused"])
@pytest.mark.parametrize("step", ["card", "processors", "directory", "file"])
def test_a_save_that_fails_leaves_the_machine_as_it_was(
    paused: bool, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "saved"
    error = kernel_error(5, "ioctl", "made up")
    with machine() as made:
        nic = Nic(made, error if step == "card" else None)
        if step == "processors":
            monkeypatch.setattr(made.cpus[1].vcpu, "xsave", lambda: 1 / 0)
        elif step == "directory":
            directory.touch()
        elif step == "file":
            monkeypatch.setattr(suspend, "_write_region", lambda *_: 1 / 0)
        run(made)
        if paused:
            made.pause()
        with pytest.raises((KernelError, ZeroDivisionError)):
            suspend.save(made, [cast(NetDevice, nic)], directory)
        assert made.running is not paused
        assert nic.went_on == [(True, False)]  # under the lock, before the vCPUs
        if paused:
            made.resume()
        wait_for_progress(made)
    assert step == "directory" or not directory.exists() or not any(directory.iterdir())


def test_saved_again_where_it_came_from(tmp_path: Path) -> None:
    """Its memory is mapped from the file that the second save replaces."""
    with machine() as made:
        run(made)
        suspend.save(made, [], tmp_path)
        counts = [count(made)]
    for _ in range(3):
        with saved(tmp_path) as made:
            assert count(made) == counts[-1]
            run(made)
            suspend.save(made, [], tmp_path)
            counts.append(count(made))
    assert counts == sorted(set(counts))
    files = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    image = suspend.MachineState.load(tmp_path).image
    assert files == {suspend.DOCUMENT: 0o600, image: 0o600}


def test_a_save_that_fails_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with machine() as made:
        run(made)
        suspend.save(made, [], tmp_path)
        saved_at, files = count(made), sorted(tmp_path.iterdir())
        made.resume()
        wait_for_progress(made)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                suspend.save(made, [], tmp_path)
        assert sorted(tmp_path.iterdir()) == files
        (tmp_path / "memory-of-old.img").touch()
        rename = Path.rename
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", lambda *names: _raise(Done(rename(*names))))
            with pytest.raises(Done):
                suspend.save(made, [], tmp_path)
        assert (tmp_path / "memory-of-old.img").exists()
    with saved(tmp_path) as made:
        assert count(made) > saved_at
        run(made)


def test_memory_that_nobody_touched_is_not_allocated_by_a_save(tmp_path: Path) -> None:
    size = 512 << 20
    with fresh_ram(size) as ram, Machine(MachineConfig(memory=size), ram, lambda _: None) as made:
        for number, region in enumerate(ram):
            with region.view() as view:
                view[region.size // 2] = number + 1
        suspend.save(made, [], tmp_path)
        assert sum(os.fstat(region.fileno()).st_blocks * 512 for region in ram) < 8 << 20
    state = suspend.MachineState.load(tmp_path)
    image = tmp_path / state.image
    assert (image.stat().st_size, image.stat().st_blocks * 512 < 8 << 20) == (size, True)
    with suspend.saved_ram(state, tmp_path) as ram:
        for number, region in enumerate(ram):
            with region.view() as view:
                assert view[region.size // 2] == number + 1


def test_a_machine_that_was_never_started(tmp_path: Path) -> None:
    with machine() as made:
        in_time(made.pause)
        suspend.save(made, [], tmp_path)
    with saved(tmp_path) as made:
        run(made)


def test_a_machine_that_has_ended_is_not_saved(tmp_path: Path) -> None:
    with machine() as made:
        run(made)
        made.end(End.POWER_OFF)
        with pytest.raises(StateError, match="the guest switched itself off"):
            suspend.save(made, [], tmp_path)
    with machine() as made:
        run(made)
        made.loop.call_soon(lambda: _raise(kernel_error(5, "ioctl", "made up")))
        with pytest.raises(KernelError, match="made up"):
            made.wait(PATIENCE)
        with pytest.raises(KernelError, match="made up"):
            suspend.save(made, [], tmp_path)
    assert not any(tmp_path.iterdir())


def test_the_first_end_stands() -> None:
    with machine() as made:
        assert made.wait(0) is None
        made.end(End.POWER_OFF)
        made.end(End.RESET)
        made.end(End.POWER_OFF)
        assert [made.wait() for _ in range(3)] == [End.POWER_OFF] * 3


def test_who_waits_learns_that_it_was_closed() -> None:
    ends: list[End | None] = []
    with machine() as made:
        waiter = threading.Thread(target=lambda: ends.append(made.wait()), daemon=True)
        waiter.start()
    waiter.join(PATIENCE)
    assert ends == [End.QUIT]
    in_time(made.close)


def test_a_close_that_is_interrupted_closes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """`nothing_left` looks."""
    with machine() as made:
        run(made)
        with monkeypatch.context() as patch:
            patch.setattr(made.cpus[0], "stop", lambda: _raise(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                made.close()
        assert made.vm.closed


class Done(BaseException):
    """What comes right behind a step, as an interrupt may."""


def _raise(error: BaseException) -> None:
    raise error


def damages(value: object) -> Iterator[object]:
    """What may be found where a document had `value`."""
    yield from (-1, 1 << 33, 1 << 70, "", "AAAA", None, [], {}, True, {"": {}}, {"-1": -1})
    if isinstance(value, list):
        yield value[1:]
        yield [*value, *value]
    if isinstance(value, str) and value.startswith("memory-"):
        yield from ("memory-00000000", "memory-", "machine.json", "/dev/zero", f"./{value}")
    elif isinstance(value, str):
        data = bytearray(base64.b64decode(value))
        for changed in (data[:-1], data[: len(data) // 2], data * 3, b"\xff" * len(data)):
            yield base64.b64encode(changed).decode()


def places(value: object) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key) of everything in a document, registers but for a few."""
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        for key in keys[:13]:
            yield value, key
            yield from places(value[key])


def test_a_damaged_document_is_refused_or_does_no_harm(tmp_path: Path) -> None:
    with machine(MachineConfig(MEMORY)) as made:
        suspend.save(made, [], tmp_path)
    path = tmp_path / suspend.DOCUMENT
    document = json.loads(path.read_text())
    refused = 0
    for container, key in list(places(document)):
        good = container[key]
        for bad in damages(good):
            container[key] = bad
            path.write_text(json.dumps(document))
            try:
                with saved(tmp_path) as made:
                    for port in (*layout.SERIAL_PORTS, *layout.PM1_EVENT_PORTS, 0xCF8, 0xCFC):
                        made.ports.read(port, 1)
            except VhostctlError:
                refused += 1
        container[key] = good
    assert refused > 100


@pytest.mark.parametrize(
    "start",
    [b"", b"\xff", b"[", b'{"x":', b'{"kvm":{"x":', b'{"serial":{"x":'],
)
def test_what_is_no_document(start: bytes, tmp_path: Path) -> None:
    (tmp_path / suspend.DOCUMENT).write_bytes(start + b"[" * 100_000)
    with pytest.raises(VhostctlError, match=suspend.DOCUMENT):
        suspend.MachineState.load(tmp_path)


@pytest.mark.parametrize("text", [b'{"version": 2, "new": []}', b'{"version": 0}'])
def test_another_version(text: bytes, tmp_path: Path) -> None:
    (tmp_path / suspend.DOCUMENT).write_bytes(text)
    with pytest.raises(VhostctlError, match=r"version [02]; this vhostctl reads version 1"):
        suspend.MachineState.load(tmp_path)


def test_cpuid_leaves_that_are_not_there_are_not_read(tmp_path: Path) -> None:
    """KVM would take them from whatever lies behind the table, and show them to the guest."""
    with machine() as made:
        suspend.save(made, [], tmp_path)
    path = tmp_path / suspend.DOCUMENT
    document = json.loads(path.read_text())
    cpuid = bytearray(base64.b64decode(document["kvm"]["cpus"][0]["cpuid"]))
    cpuid[:4] = (cpuid[0] + 8).to_bytes(4, "little")
    document["kvm"]["cpus"][0]["cpuid"] = base64.b64encode(cpuid).decode()
    path.write_text(json.dumps(document))
    with pytest.raises(VhostctlError, match="CPUID of"), saved(tmp_path):
        pass
