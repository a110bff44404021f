"""Steering programs and grace periods, against this machine's kernel and against a record."""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import suppress
from pathlib import Path

import pytest

from vhostctl.abi import bpf
from vhostctl.errors import InvalidArgument, KernelError, KernelPermissionError
from vhostctl.host import steering
from vhostctl.host.steering import Steering, grace_period


class Kernel:
    """Takes system calls; notes the program of a BPF_PROG_LOAD."""

    def __init__(self, result: int) -> None:
        self.result = result
        self.program: list[tuple[int, int, int, int]] = []

    def syscall(self, number: ctypes.c_long, command: ctypes.c_long, *arguments: object) -> int:
        if number.value == steering._SYS_BPF:
            assert command.value == bpf.bpf_cmd.BPF_PROG_LOAD
            pointer, size = arguments
            assert isinstance(size, ctypes.c_long)
            assert size.value == ctypes.sizeof(bpf.bpf_attr)
            attributes = ctypes.cast(pointer, ctypes.POINTER(bpf.bpf_attr)).contents  # type: ignore[arg-type]
            assert attributes.prog_type == bpf.bpf_prog_type.BPF_PROG_TYPE_SOCKET_FILTER
            assert ctypes.string_at(attributes.license) == b"GPL"
            code = (bpf.bpf_insn * attributes.insn_cnt).from_address(attributes.insns)
            self.program = [(i.code, i._registers, i.off, i.imm) for i in code]
        if self.result < 0:
            ctypes.set_errno(-self.result)
            return -1
        return self.result


def test_a_program_is_two_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
    monkeypatch.setattr(steering, "_libc", kernel)
    with Steering.to_queue(7) as program:
        assert program.fileno() == kernel.result
    assert program.closed
    assert kernel.program == [(0xB7, 0, 0, 7), (0x95, 0, 0, 0)]  # r0 = 7; exit


@pytest.mark.parametrize("index", [-1, 1 << 16])
def test_a_queue_that_no_tap_has(index: int) -> None:
    with pytest.raises(InvalidArgument, match=f"queue {index}"):
        Steering.to_queue(index)


def test_a_refusal_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steering, "_libc", Kernel(-errno.EPERM))
    with pytest.raises(KernelPermissionError, match=r"BPF_PROG_LOAD .*CAP_BPF"):
        Steering.to_queue(0)
    monkeypatch.setattr(steering, "_libc", Kernel(-errno.EINVAL))
    with pytest.raises(KernelError, match="MEMBARRIER_CMD_GLOBAL on this machine"):
        grace_period()


def test_this_kernel_takes_it() -> None:
    """The verifier has the last word where it is asked; another user may not ask."""
    with suppress(KernelPermissionError), Steering.to_queue(3) as program:
        target = Path(f"/proc/self/fd/{program.fileno()}").readlink()
        assert str(target) == "anon_inode:bpf-prog"
