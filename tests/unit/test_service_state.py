"""What a service writes down, and what the next one makes of it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import pytest

from vhostctl.errors import StateError, kernel_error
from vhostctl.host.links import LinkState
from vhostctl.service import state
from vhostctl.service.spec import DeviceSpec
from vhostctl.service.state import Journal, StateDirectory, TapBefore

SPEC = DeviceSpec(
    name="demo",
    tap="tap0",
    addresses=("192.0.2.1/24", "198.51.100.1/24"),
    mtu=1400,
    bridge="br0",
)


@dataclass
class Machine:
    """A tap, in place of links, tun and netlink."""

    link: LinkState = field(
        default_factory=lambda: LinkState(7, "tun", 1300, "", False, 0, False, True)
    )
    addresses_: set[str] = field(default_factory=lambda: {"198.51.100.1/24"})
    header: int = 10
    buffer: int = 1 << 20
    there: bool = True
    broken: bool = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass

    @property
    def queues(self) -> list[Self]:
        return [self]

    def state(self, _name: str) -> LinkState:
        return self.link

    def addresses(self, _name: str) -> list[str]:
        return sorted(self.addresses_)

    def change(self, name: str, **settings: Any) -> None:
        if self.broken:
            raise kernel_error(5, "set", name)
        if "state" in settings:
            settings = {"up": settings["state"] == "up"}
        self.link = replace(self.link, **settings)

    def remove_address(self, _name: str, cidr: str) -> None:
        self.addresses_.remove(cidr)

    def vnet_hdr_size(self) -> int:
        return self.header

    def set_vnet_hdr_size(self, size: int) -> None:
        self.header = size

    def sndbuf(self) -> int:
        return self.buffer

    def set_sndbuf(self, size: int) -> None:
        self.buffer = size

    def serve_device(self) -> None:
        """What a running device makes of the tap."""
        self.link = replace(self.link, mtu=1400, up=True, master=3)
        self.addresses_ |= {"192.0.2.1/24"}
        self.header, self.buffer = 12, 2**31 - 1


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(state, "exists", lambda _name: made.there)
    monkeypatch.setattr(state, "Links", lambda: made)

    class Taps:
        @staticmethod
        def open(_name: str, _queues: int = 1) -> Machine:
            return made

    monkeypatch.setattr(state, "Tap", Taps)
    return made


def test_a_journal_notes_what_there_was(machine: Machine) -> None:
    journal = Journal.of(SPEC)
    assert journal.before == TapBefore(7, 1300, False, 0, 10, 1 << 20)
    assert journal.addresses == ("192.0.2.1/24",)  # it had the other
    machine.there = False
    assert Journal.of(SPEC) == Journal("demo", "tap0")


def test_what_a_killed_service_left_is_taken_back(machine: Machine, tmp_path: Path) -> None:
    with StateDirectory(tmp_path) as directory:
        directory.write(Journal.of(SPEC))
        before = replace(machine, addresses_=set(machine.addresses_))
        machine.serve_device()
        assert machine != before
        assert directory.recover() == [
            "demo: tap tap0: address 192.0.2.1/24 removed",
            "demo: tap tap0: set down",
            "demo: tap tap0: bridge br0 left",
            "demo: tap tap0: MTU 1300 again",
            "demo: tap tap0: header of 10 bytes again",
            f"demo: tap tap0: send buffer of {1 << 20} bytes again",
        ]
        assert machine == before
        assert directory.recover() == []
        assert list(tmp_path.iterdir()) == []


def test_what_somebody_set_since_stays(machine: Machine) -> None:
    journal = Journal.of(SPEC)
    machine.serve_device()
    machine.link = replace(machine.link, mtu=1450)
    journal.take_back()
    assert machine.link.mtu == 1450


@pytest.mark.parametrize("mtu", [1400, 1350])
def test_an_mtu_that_was_about_to_change_is_taken_back(machine: Machine, mtu: int) -> None:
    journal = msgspec.structs.replace(Journal.of(SPEC), mtu=1350, old_mtu=1400)
    machine.link = replace(machine.link, mtu=mtu)
    assert journal.take_back() == ["MTU 1300 again"]
    assert machine.link.mtu == 1300


def test_another_tap_of_that_name_is_left_alone(machine: Machine) -> None:
    journal = Journal.of(SPEC)
    machine.serve_device()
    machine.link = replace(machine.link, index=8)
    assert journal.take_back() == []
    assert machine.link.up
    machine.there = False
    assert journal.take_back() == []


def test_what_cannot_be_taken_back_is_said_and_not_tried_again(
    machine: Machine, tmp_path: Path
) -> None:
    with StateDirectory(tmp_path) as directory:
        directory.write(Journal.of(SPEC))
        machine.serve_device()
        machine.broken = True
        (said,) = directory.recover()
        assert said.startswith("demo: tap tap0 is not as before: set on tap0")
        assert directory.recover() == []


@pytest.mark.parametrize("content", [b"", b"{", b'{"device": 3}', b"\xff" * 100])
def test_half_written_files_are_removed(tmp_path: Path, content: bytes) -> None:
    for name in ("device-demo.json", "device-demo.json.tmp", "service.json"):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "theirs").write_bytes(content)
    with StateDirectory(tmp_path) as directory:
        assert directory.recover() == [f"{tmp_path}/device-demo.json: unreadable, removed"]
    assert [file.name for file in tmp_path.iterdir()] == ["theirs"]


def test_a_stale_socket_goes_and_a_live_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "qmp.sock"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        with StateDirectory(tmp_path) as directory:
            directory.announce(path)
            assert directory.recover() == []
            directory.announce(path)
            listening.close()
            assert directory.recover() == [f"socket {path} removed"]
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_sockets_place_stays(tmp_path: Path) -> None:
    path = tmp_path / "qmp.sock"
    path.write_text("not ours")
    with StateDirectory(tmp_path) as directory:
        directory.announce(path)
        assert directory.recover() == []
    assert path.read_text() == "not ours"


def test_one_service_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "_ENDING", 0.05)
    where = tmp_path / "deep" / "state"
    with StateDirectory(where) as first:
        with pytest.raises(StateError, match="another service has it"):
            StateDirectory(where)
        first.announce(None)
        with pytest.raises(StateError, match=f"the service with PID {os.getpid()} has it"):
            StateDirectory(where)
        assert (where / "service.json").exists()
    with StateDirectory(where):
        pass


def test_the_lock_goes_with_the_process(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path\n"
        "from vhostctl.service.state import StateDirectory\n"
        "d = StateDirectory(Path(sys.argv[1])); d.announce(None)\n"
        "print(flush=True); time.sleep(100)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(StateError, match=f"PID {process.pid} "):
        StateDirectory(tmp_path)
    process.kill()
    with StateDirectory(tmp_path) as directory:
        assert directory.recover() == []
        process.communicate(timeout=10)
    assert list(tmp_path.iterdir()) == []


def test_where_state_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    assert state.default_state() == Path("/run/vhostctl")
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/a:/run/b")
    assert state.default_state() == Path("/run/a")
    assert state.default_socket(Path("/x")) == Path("/x/qmp.sock")
