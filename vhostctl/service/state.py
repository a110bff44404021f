"""What a service leaves in the file system, so that the next one can clean up after it.

A tap that was made here goes with the process, however it ends. What stays after SIGKILL are
the settings of a tap that was there before, the socket, and the files of this directory.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from vhostctl.errors import StateError, VhostctlError, kernel_error
from vhostctl.host.closing import Closing
from vhostctl.host.links import Links, exists
from vhostctl.host.tap import Tap
from vhostctl.service.spec import DeviceSpec

T = TypeVar("T")

DEFAULT_STATE = Path("/run/vhostctl")
_SOCKET = "qmp.sock"
_SERVICE = "service.json"
_DEVICES = "device-*.json"
_HALF = ".tmp"
_ENDING = 1.0  # seconds
_DYING = 5.0
_LOOK = 0.01
_SELF = Path("/proc/self")
_STATE, _STARTED = 0, 19


def default_state() -> Path:
    """Return where state lies if nobody says: as systemd says, or /run/vhostctl."""
    return Path(os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0] or DEFAULT_STATE)


def default_socket(state: Path) -> Path:
    """Return where the service of the state directory `state` listens, if nobody says."""
    return state / _SOCKET


class TapBefore(msgspec.Struct, frozen=True):
    """What a tap had before: its index, bytes of MTU, header and send buffer, bridge's index."""

    index: int
    mtu: int
    up: bool
    master: int
    header_size: int
    sndbuf: int


class Journal(msgspec.Struct, frozen=True):
    """What a device is about to change: `addresses` and what else it sets, and what was before.

    `before` is None for a tap that is made for it, `old_mtu` the MTU that `mtu` takes the place of.
    """

    device: str
    tap: str
    addresses: tuple[str, ...] = ()
    mtu: int | None = None
    bridge: str | None = None
    before: TapBefore | None = None
    old_mtu: int | None = None

    @classmethod
    def of(cls, spec: DeviceSpec) -> Journal:
        """Look at the tap of `spec`. Raises InvalidArgument and KernelError, as Tap.open()."""
        if not exists(spec.tap):
            return cls(spec.name, spec.tap)
        with Tap.open(spec.tap, spec.queues) as tap, Links() as links:
            link = links.state(spec.tap)
            there = links.addresses(spec.tap)
            queue = tap.queues[0]
            before = TapBefore(
                index=link.index,
                mtu=link.mtu,
                up=link.up,
                master=link.master,
                header_size=queue.vnet_hdr_size(),
                sndbuf=queue.sndbuf(),
            )
        ours = sorted(_plain(spec.addresses) - _plain(there))
        return cls(spec.name, spec.tap, tuple(ours), spec.mtu, spec.bridge, before)

    def take_back(self) -> list[str]:
        """Give the tap back what it had, as far as it has what this device set.

        Returns what was changed, in words. Raises VhostctlError.
        """
        before = self.before
        if before is None or not exists(self.tap):
            return []
        with Links() as links:
            if links.state(self.tap).index != before.index:
                return []  # another one of that name
            done = [*self._addresses(links), *self._link(links, before)]
        return [*done, *self._header(before)]

    def _addresses(self, links: Links) -> Iterator[str]:
        for cidr in sorted(set(self.addresses) & _plain(links.addresses(self.tap))):
            links.remove_address(self.tap, cidr)
            yield f"address {cidr} removed"

    def _link(self, links: Links, before: TapBefore) -> Iterator[str]:
        now = links.state(self.tap)
        if now.up and not before.up:
            links.change(self.tap, state="down")
            yield "set down"
        if self.bridge is not None and now.master != before.master:
            links.change(self.tap, master=before.master)
            yield f"bridge {self.bridge} left"
        if now.mtu in (self.mtu, self.old_mtu) and now.mtu != before.mtu:
            links.change(self.tap, mtu=before.mtu)
            yield f"MTU {before.mtu} again"

    def _header(self, before: TapBefore) -> Iterator[str]:
        with Tap.open(self.tap) as tap:
            queue = tap.queues[0]
            if queue.vnet_hdr_size() != before.header_size:
                queue.set_vnet_hdr_size(before.header_size)
                yield f"header of {before.header_size} bytes again"
            if queue.sndbuf() != before.sndbuf:
                queue.set_sndbuf(before.sndbuf)
                yield f"send buffer of {before.sndbuf} bytes again"


class _Owner(msgspec.Struct, frozen=True):
    """Who has the directory, since which tick of the machine, and where it listens."""

    pid: int
    since: str
    socket: str | None


class StateDirectory(Closing):
    """A directory that one service at a time has; a context manager.

    The lock goes with the process, so that it tells the truth after SIGKILL too.
    """

    def __init__(self, path: Path) -> None:
        """Make the directory if need be, and lock it; whoever has it gets a second to end.

        Raises StateError, which says who has it, and KernelError.
        """
        self.path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise kernel_error(
                error.errno or 0, "open state directory", str(path), "check it, or give --state"
            ) from error
        try:
            self._lock()
        except BaseException:
            os.close(self._fd)
            raise

    def _lock(self) -> None:
        deadline = time.monotonic() + _ENDING
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() < deadline:
                    time.sleep(_LOOK)
                    continue
                owner = _read(self.path / _SERVICE, _Owner)
                who = f"the service with PID {owner.pid}" if owner else "another service"
                raise StateError(
                    f"state directory {self.path}: {who} has it", hint="give --state another one"
                ) from error
            return

    def recover(self) -> list[str]:
        """Take back what a service that was killed left; return what was done, in words.

        What cannot be taken back is said, and not tried again.
        """
        done: list[str] = []
        owner = _read(self.path / _SERVICE, _Owner)
        if owner is not None:
            _wait_for_end(owner)
            if owner.socket is not None and _is_stale(Path(owner.socket)):
                Path(owner.socket).unlink(missing_ok=True)
                done.append(f"socket {owner.socket} removed")
            # Who comes next, if this is killed too, has to wait for its descriptors.
            self._announce(owner.socket)
        for file in sorted(self.path.glob(_DEVICES)):
            done += _take_back(file)
            file.unlink(missing_ok=True)
        for file in (*self.path.glob(f"*{_HALF}"), self.path / _SERVICE):
            file.unlink(missing_ok=True)
        return done

    def announce(self, listening: Path | None) -> None:
        """Write down who has the directory and where its socket is, before that is made."""
        self._announce(None if listening is None else str(listening.absolute()))

    def _announce(self, where: str | None) -> None:
        self._write(_SERVICE, _Owner(os.getpid(), _stat(_SELF)[_STARTED], where))

    def write(self, journal: Journal) -> None:
        """Write down what a device is about to change. Raises KernelError."""
        self._write(_DEVICES.replace("*", journal.device), journal)

    def forget(self, journal: Journal) -> None:
        """Remove what `write()` wrote: everything was taken back."""
        (self.path / _DEVICES.replace("*", journal.device)).unlink(missing_ok=True)

    def _write(self, name: str, content: msgspec.Struct) -> None:
        # No fsync(): a machine that goes down takes every tap and link with it.
        half = self.path / (name + _HALF)
        try:
            half.write_bytes(msgspec.json.encode(content) + b"\n")
            half.replace(self.path / name)
        except OSError as error:
            raise kernel_error(error.errno or 0, "write", str(half), "check the disk") from error

    def close(self) -> None:
        """Leave the directory empty of ours and unlock it; a second call does nothing."""
        if self._fd < 0:
            return
        with suppress(FileNotFoundError):
            (self.path / _SERVICE).unlink()
        os.close(self._fd)
        self._fd = -1


def _plain(cidrs: Iterable[str]) -> set[str]:
    return {str(ipaddress.ip_interface(cidr)) for cidr in cidrs}


def _read(file: Path, kind: type[T]) -> T | None:
    """Return what the file says; None if it is missing or no such thing."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError):
        return None


def _take_back(file: Path) -> list[str]:
    journal = _read(file, Journal)
    if journal is None:
        return [f"{file}: unreadable, removed"]
    try:
        return [f"{journal.device}: tap {journal.tap}: {done}" for done in journal.take_back()]
    except VhostctlError as error:
        return [f"{journal.device}: tap {journal.tap} is not as before: {error}"]


def _is_stale(path: Path) -> bool:
    """Return whether `path` is a socket that nobody listens on."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # systemd may hold it, and nobody accept yet
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return path.is_socket()
        except OSError:
            pass
    return False


def _wait_for_end(owner: _Owner) -> None:
    """Wait until a process that was killed has closed everything, the lock not being all."""
    deadline = time.monotonic() + _DYING
    while _holds_something(owner) and time.monotonic() < deadline:
        time.sleep(_LOOK)


def _holds_something(owner: _Owner) -> bool:
    """Return whether any thread of `owner`, another process, is more than a zombie."""
    if owner.pid == os.getpid():
        return False
    process = Path(f"/proc/{owner.pid}")
    try:
        if _stat(process)[_STARTED] != owner.since:
            return False  # another one of that number
        return any(_stat(task)[_STATE] not in "ZX" for task in (process / "task").iterdir())
    except OSError:
        return process.exists()


def _stat(directory: Path) -> list[str]:
    """Return what proc(5) has in stat after the name in parentheses."""
    return (directory / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
