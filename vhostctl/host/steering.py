"""Programs that choose the queue of a tap for each frame, and the wait until all use them."""

from __future__ import annotations

import ctypes
from typing import Self

from vhostctl.abi import bpf
from vhostctl.errors import InvalidArgument, kernel_error
from vhostctl.host.handle import Handle

# asm/unistd_64.h and linux/membarrier.h; glibc has no functions for these.
_SYS_BPF = 321
_SYS_MEMBARRIER = 324
_MEMBARRIER_CMD_GLOBAL = 1

_MAX_INDEX = 0xFFFF

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_long = ctypes.c_long


class Steering(Handle):
    """A loaded BPF program for TUNSETSTEERINGEBPF, which takes its descriptor.

    A tap that was given the program keeps it when this is closed.
    """

    @classmethod
    def to_queue(cls, index: int) -> Self:
        """Load a program that sends every frame to queue `index`, modulo the enabled queues.

        Raises InvalidArgument, and KernelError: EPERM without CAP_BPF where
        kernel.unprivileged_bpf_disabled is set, ENOSYS without CONFIG_BPF_SYSCALL.
        """
        if not 0 <= index <= _MAX_INDEX:
            raise InvalidArgument(f"queue {index}", hint=f"use 0..{_MAX_INDEX}")
        program = (bpf.bpf_insn * 2)(
            bpf.bpf_insn(code=bpf.BPF_ALU64 | bpf.BPF_MOV | bpf.BPF_K, imm=index),
            bpf.bpf_insn(code=bpf.BPF_JMP | bpf.BPF_EXIT),
        )
        # The kernel wants a licence of every program; this one calls nothing that asks for it.
        licence = ctypes.create_string_buffer(b"GPL")
        attributes = bpf.bpf_attr(
            prog_type=bpf.bpf_prog_type.BPF_PROG_TYPE_SOCKET_FILTER,
            insn_cnt=len(program),
            insns=ctypes.addressof(program),
            license=ctypes.addressof(licence),
        )
        fd = _libc.syscall(
            _long(_SYS_BPF),
            _long(bpf.bpf_cmd.BPF_PROG_LOAD),
            ctypes.byref(attributes),
            _long(ctypes.sizeof(attributes)),
        )
        if fd < 0:
            hint = "run with CAP_BPF, or set kernel.unprivileged_bpf_disabled to 0"
            raise kernel_error(ctypes.get_errno(), "BPF_PROG_LOAD", "a steering program", hint)
        return cls(fd, f"steering to queue {index}")


def grace_period() -> None:
    """Wait until every frame that was on its way into a tap before this call is there.

    Who sends a frame chooses the queue and puts the frame there inside one RCU reader, and
    MEMBARRIER_CMD_GLOBAL waits for an RCU grace period. Raises KernelError: EINVAL on a
    machine with nohz_full CPUs, ENOSYS.
    """
    if _libc.syscall(_long(_SYS_MEMBARRIER), _long(_MEMBARRIER_CMD_GLOBAL), _long(0), _long(0)):
        raise kernel_error(ctypes.get_errno(), "MEMBARRIER_CMD_GLOBAL", "this machine")
