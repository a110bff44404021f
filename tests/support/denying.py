"""What denies a process a device: a program on its cgroup, Landlock."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vhostctl.abi import bpf

# asm/unistd_64.h
_SYS_BPF = 321
_SYS_LANDLOCK_CREATE_RULESET, _SYS_LANDLOCK_ADD_RULE, _SYS_LANDLOCK_RESTRICT_SELF = 444, 445, 446
# linux/bpf.h
_PROG_LOAD, _PROG_ATTACH, _PROG_DETACH = 5, 8, 9
_TYPE_CGROUP_DEVICE, _ATTACH_CGROUP_DEVICE = 15, 6
# linux/landlock.h
_WRITE_FILE, _RULE_PATH_BENEATH = 1 << 1, 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _Attach(ctypes.Structure):
    _fields_ = (
        ("target_fd", ctypes.c_uint32),
        ("attach_bpf_fd", ctypes.c_uint32),
        ("attach_type", ctypes.c_uint32),
        ("attach_flags", ctypes.c_uint32),
    )


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def cgroup2() -> Path:
    """Where the cgroups of version 2 are mounted."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if " - cgroup2 " in line:
            return Path(line.split()[4])
    raise AssertionError("no cgroup2 is mounted")


@contextmanager
def device_group(minor: int) -> Iterator[Path]:
    """A cgroup whose members may not open the misc device with this minor; gone afterwards."""
    group = cgroup2() / f"doctor-{os.getpid()}"
    group.mkdir()
    try:
        program = _device_program(minor)
        try:
            _attach(_PROG_ATTACH, group, program)
        finally:
            os.close(program)
        yield group
    finally:
        group.rmdir()


def allow_devices(group: Path) -> None:
    """Take the program off again."""
    _attach(_PROG_DETACH, group, 0)


def _attach(command: int, group: Path, program: int) -> None:
    fd = os.open(group, os.O_RDONLY | os.O_DIRECTORY)
    try:
        attributes = _Attach(fd, program, _ATTACH_CGROUP_DEVICE, 0)
        _system_call(_SYS_BPF, command, ctypes.byref(attributes), ctypes.sizeof(attributes))
    finally:
        os.close(fd)


def _device_program(minor: int) -> int:
    """Load: r0 = 1; if ((struct bpf_cgroup_dev_ctx *)r1)->minor is `minor`, r0 = 0."""
    # code, source << 4 | destination, offset, immediate: struct bpf_insn of linux/bpf.h
    words = (
        (0x61, 0x12, 8, 0),
        (0xB7, 0, 0, 1),
        (0x55, 2, 1, minor),
        (0xB7, 0, 0, 0),
        (0x95, 0, 0, 0),
    )
    program = ctypes.create_string_buffer(b"".join(struct.pack("<BBhi", *one) for one in words))
    licence = ctypes.create_string_buffer(b"GPL")
    attributes = bpf.bpf_attr(
        prog_type=_TYPE_CGROUP_DEVICE,
        insn_cnt=len(words),
        insns=ctypes.addressof(program),
        license=ctypes.addressof(licence),
    )
    size = ctypes.sizeof(attributes)
    return _system_call(_SYS_BPF, _PROG_LOAD, ctypes.byref(attributes), size)


def write_only_to(paths: Iterable[str]) -> None:
    """Have Landlock deny this process, for good, to open anything else for writing."""
    handled = ctypes.c_uint64(_WRITE_FILE)
    ruleset = _system_call(
        _SYS_LANDLOCK_CREATE_RULESET, ctypes.byref(handled), ctypes.sizeof(handled), 0
    )
    for path in paths:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = _PathBeneath(_WRITE_FILE, fd)
        _system_call(_SYS_LANDLOCK_ADD_RULE, ruleset, _RULE_PATH_BENEATH, ctypes.byref(rule), 0)
        os.close(fd)
    _system_call(_SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _system_call(number: int, *arguments: object) -> int:
    passed = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    result = int(_libc.syscall(ctypes.c_long(number), *passed))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"system call {number}")
    return result
