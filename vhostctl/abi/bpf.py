"""Mirror of the few parts of ``linux/bpf.h`` that load a program of constant result."""

from __future__ import annotations

import ctypes
import enum

from vhostctl.abi.layout import Struct

HEADERS = ("linux/bpf.h",)

BPF_K = 0x00
BPF_JMP = 0x05
BPF_ALU64 = 0x07
BPF_EXIT = 0x90
BPF_MOV = 0xB0


class bpf_cmd(enum.IntEnum):
    """What bpf(2) is asked for."""

    BPF_PROG_LOAD = 5


class bpf_prog_type(enum.IntEnum):
    """What a program is for."""

    BPF_PROG_TYPE_SOCKET_FILTER = 1


class bpf_insn(Struct):
    """One instruction (8 bytes); the registers are left at 0, the destination being r0."""

    __slots__ = ()
    _fields_ = (
        ("code", ctypes.c_uint8),
        ("_registers", ctypes.c_uint8),
        ("off", ctypes.c_int16),
        ("imm", ctypes.c_int32),
    )


class bpf_attr(ctypes.Structure):
    """The first fields of ``union bpf_attr`` for BPF_PROG_LOAD; the kernel takes the rest as 0."""

    _fields_ = (
        ("prog_type", ctypes.c_uint32),
        ("insn_cnt", ctypes.c_uint32),
        ("insns", ctypes.c_uint64),
        ("license", ctypes.c_uint64),
    )
