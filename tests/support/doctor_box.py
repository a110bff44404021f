"""A child with a /dev and an /etc of its own, where the doctor's faults are made for real."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from vhostctl.doctor.examine import examine
from vhostctl.doctor.findings import Finding
from vhostctl.doctor.system import System
from vhostctl.host.vhost import DEFAULT_PATH

TUN, KVM = "/dev/net/tun", "/dev/kvm"
NUMBERS = {DEFAULT_PATH: (10, 238), TUN: (10, 200), KVM: (10, 232)}
NOBODY = 65534

_CLONE_NEWNS = 0x20000
_CLONE_NEWUSER = 0x10000000
_MS_REC_PRIVATE = 0x4000 | (1 << 18)
_CHARACTER = 0o020000
_SHARED = {"null": (1, 3), "zero": (1, 5), "urandom": (1, 9)}
_ETC = ("passwd", "group", "shadow", "gshadow", "os-release", "login.defs")

_libc = ctypes.CDLL(None, use_errno=True)


def look(device: str = DEFAULT_PATH) -> dict[str, Finding]:
    """What a fresh look finds, by code."""
    return {one.fault.code: one for one in examine(System(device)).findings}


def shell(remedy: str) -> None:
    """Type a remedy; what it prints goes to stderr."""
    subprocess.run(["sh", "-ec", remedy], check=True, stdout=sys.stderr.fileno())


def in_child(work: Callable[[], Any]) -> Any:
    """Run `work` in a child; return its result, which goes through JSON. An exception fails."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            with open(writing, "w") as pipe:
                json.dump(work(), pipe)
            status = 0
        except BaseException:  # noqa: BLE001 - pytest's own must not go on in two processes
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(writing)
    with open(reading) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    assert status == 0
    return json.loads(text)


def as_nobody(work: Callable[[], Any]) -> Any:
    """Run `work` in a child that is nobody, with the groups that /etc/group gives it."""

    def lowered() -> Any:
        os.initgroups("nobody", NOBODY)
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        return work()

    return in_child(lowered)


def in_box(work: Callable[[], Any]) -> Any:
    """Run `work` in a child with a /dev of nodes that open for all, and a copy of /etc's users."""

    def boxed() -> Any:
        _call("unshare", _CLONE_NEWNS)
        _mount(None, "/", None, _MS_REC_PRIVATE)
        _fill_dev()
        _fill_etc()
        return work()

    return in_child(boxed)


def in_user_namespace(work: Callable[[], Any]) -> Any:
    """Run `work` in a child that made a user namespace without a map."""

    def apart() -> Any:
        _call("unshare", _CLONE_NEWUSER)
        return work()

    return in_child(apart)


def mknod(path: str, number: tuple[int, int], mode: int = 0o666) -> None:
    """Make a character device with exactly this mode."""
    os.mknod(path, _CHARACTER | mode, os.makedev(*number))
    Path(path).chmod(mode)


def _fill_dev() -> None:
    there = [path for path in NUMBERS if Path(path).exists()]
    _mount("tmpfs", "/dev", "tmpfs", 0)
    Path("/dev/net").mkdir()
    for name, number in _SHARED.items():
        mknod(f"/dev/{name}", number)
    for path in there:
        mknod(path, NUMBERS[path])


def _fill_etc() -> None:
    kept = {name: Path("/etc", name).read_bytes() for name in _ETC if Path("/etc", name).exists()}
    _mount("tmpfs", "/etc", "tmpfs", 0)
    for name, content in kept.items():
        Path("/etc", name).write_bytes(content)
    shutil.copymode("/", "/etc")


def drop(capabilities: Iterable[int]) -> None:
    """Take capabilities out of every set of this thread (capset(2), linux/capability.h)."""
    status = Path("/proc/self/status").read_text()
    held = {
        name: int(status.partition(f"Cap{name}:")[2].split()[0], 16)
        for name in ("Eff", "Prm", "Inh")
    }
    keep = ~sum(1 << one for one in capabilities)
    low, high = (
        [held[name] >> shift & keep >> shift & 0xFFFFFFFF for name in held] for shift in (0, 32)
    )
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    _call("capset", header, (ctypes.c_uint32 * 6)(*low, *high))


def _mount(source: str | None, target: str, kind: str | None, flags: int) -> None:
    words = [None if word is None else word.encode() for word in (source, target, kind)]
    _call("mount", *words, ctypes.c_ulong(flags), None)


def _call(name: str, *arguments: Any) -> None:
    if getattr(_libc, name)(*arguments):
        raise OSError(ctypes.get_errno(), name)
