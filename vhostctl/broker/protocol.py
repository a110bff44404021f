"""What a caller and the broker say to each other: one packet each way, JSON.

The socket is AF_UNIX, SOCK_SEQPACKET. A caller sends one `Request` and gets one answer; the
descriptors of a `Granted` come with it (SCM_RIGHTS): the tap's queues, then as many vhost
devices, which have no owner. The connection ends there.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from vhostctl.errors import (
    EnvironmentMissing,
    InvalidArgument,
    KernelError,
    VhostctlError,
    kernel_error,
)
from vhostctl.host.vhost import DEFAULT_PATH

LONGEST = 4096
"""Bytes that a packet may have."""

_EXCERPT = 200  # characters

MAX_QUEUES = 126
"""Queue pairs in one answer: it carries at most 253 descriptors (SCM_MAX_FD of net/scm.h)."""

# Printable ASCII without what no link name has: %, / and :. A name goes into a log too.
LinkName = Annotated[str, msgspec.Meta(pattern=r"\A[!-$&-.0-9;-~]{1,15}\Z")]
NodePath = Annotated[str, msgspec.Meta(pattern=r"\A/[!-~]{1,254}\Z")]


class Refused(EnvironmentMissing):
    """The policy does not allow what was asked for."""


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a caller wants; without `tap` the broker chooses a free name that the policy allows."""

    tap: LinkName | None = None
    queues: Annotated[int, msgspec.Meta(ge=1, le=MAX_QUEUES)] = 1
    bridge: LinkName | None = None
    device: NodePath = DEFAULT_PATH


class Granted(msgspec.Struct, frozen=True, tag="granted", tag_field="answer"):
    """Descriptors come with it; `created` says whether the tap was made for this."""

    tap: str
    created: bool


class Denied(msgspec.Struct, frozen=True, tag="refused", tag_field="answer"):
    """The policy, or the broker's own limits, say no."""

    message: str
    hint: str = ""


class Failed(msgspec.Struct, frozen=True, tag="failed", tag_field="answer"):
    """It is allowed, and did not work; `errno`, `request` and `target` as in a KernelError."""

    message: str
    hint: str = ""
    errno: int = 0
    request: str = ""
    target: str = ""


_DECODER: msgspec.json.Decoder[Granted | Denied | Failed] = msgspec.json.Decoder(
    Granted | Denied | Failed
)


def parse_request(data: bytes) -> Request:
    """Return what `data` asks for. Raises Refused for anything that is no request."""
    try:
        return msgspec.json.decode(data, type=Request)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        why = str(error).encode("unicode_escape").decode()[:_EXCERPT]  # it quotes what was sent
        raise Refused(f"no request: {why}", hint="see docs/broker.md") from error


def parse_answer(data: bytes, broker: str) -> Granted:
    """Return what `data` grants. Raises Refused, or what made the broker fail."""
    try:
        answer = _DECODER.decode(data)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise InvalidArgument(f"{broker}: {error}", hint="is that the broker's socket?") from error
    if isinstance(answer, Denied):
        raise Refused(answer.message, hint=answer.hint)
    if isinstance(answer, Failed):
        if answer.errno:
            raise kernel_error(answer.errno, answer.request, answer.target, answer.hint)
        raise InvalidArgument(answer.message, hint=answer.hint)
    return answer


def denial(error: VhostctlError) -> Denied | Failed:
    """Return the answer that tells a caller of `error`."""
    if isinstance(error, Refused):
        return Denied(message_of(error), error.hint)
    if isinstance(error, KernelError):
        return Failed(message_of(error), error.hint, error.errno or 0, error.request, error.target)
    return Failed(message_of(error), error.hint)


def message_of(error: VhostctlError) -> str:
    """Return what `error` says without its hint."""
    return str(error).removesuffix(f"; {error.hint}") if error.hint else str(error)
