"""The caller's end of the broker: a tap and its vhost devices, without privileges."""

from __future__ import annotations

import array
import errno
import os
import socket
from pathlib import Path

import msgspec

from vhostctl.broker import SOCKET
from vhostctl.broker.protocol import MAX_QUEUES, Request, parse_answer
from vhostctl.errors import InvalidArgument, KernelError, kernel_error
from vhostctl.host.tap import Tap, TapQueue
from vhostctl.host.vhost import DEFAULT_PATH, VhostNet

PATIENCE = 60.0
"""Seconds that the broker has for an answer: it serves one caller after the other."""

_ANSWER = 1 << 16  # bytes: a refusal may list what a rule has


def request(
    socket_path: str | Path = SOCKET,
    *,
    tap: str | None = None,
    queues: int = 1,
    bridge: str | None = None,
    device: str = DEFAULT_PATH,
) -> tuple[Tap, list[VhostNet]]:
    """Ask the broker at `socket_path` for a tap with `queues` queues, and a device for each.

    Without `tap` the broker chooses a name that its policy allows. The devices have no owner:
    SET_OWNER is the caller's. All of it is the caller's to close, and a tap that was made goes
    with its last queue. Raises Refused (the policy), InvalidArgument, and KernelError (no
    broker, no device, tap in use, out of descriptors).
    """
    wanted = Request(tap=tap, queues=queues, bridge=bridge, device=device)
    try:
        data, descriptors = _ask(str(socket_path), msgspec.json.encode(wanted))
    except OSError as error:
        raise _failure(error, str(socket_path)) from error
    try:
        answer = parse_answer(data, str(socket_path))
        if len(descriptors) != 2 * queues:
            raise InvalidArgument(
                f"{socket_path}: {len(descriptors)} descriptors of {2 * queues} arrived",
                hint="raise the limit of open files (ulimit -n)",
            )
    except BaseException:
        for fd in descriptors:
            os.close(fd)
        raise
    opened = [
        TapQueue.adopt(fd, f"{answer.tap} queue {index}")
        for index, fd in enumerate(descriptors[:queues])
    ]
    devices = [VhostNet.adopt(fd, device) for fd in descriptors[queues:]]
    return Tap(answer.tap, opened, created=answer.created), devices


def _ask(path: str, data: bytes) -> tuple[bytes, list[int]]:
    descriptors = array.array("i")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(path)
        sock.send(data)
        room = socket.CMSG_LEN(2 * MAX_QUEUES * descriptors.itemsize)
        answer, ancillary, _, _ = sock.recvmsg(_ANSWER, room, socket.MSG_CMSG_CLOEXEC)
    for level, kind, body in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(body[: len(body) - len(body) % descriptors.itemsize])
    return answer, list(descriptors)


def _failure(error: OSError, path: str) -> KernelError:
    number = error.errno or (errno.ETIMEDOUT if isinstance(error, TimeoutError) else 0)
    start = "start one: systemctl start vhostctl-broker.socket, or `vhostctl broker`"
    hint = {
        errno.ENOENT: start,
        errno.ECONNREFUSED: start,
        errno.ETIMEDOUT: "the broker does not answer: look at its journal",
    }.get(number, "is that the broker's socket?")
    return kernel_error(number, "ask the broker", path, hint)
