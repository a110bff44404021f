"""The commands that every QMP server has, and the schema of all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import msgspec

from vhostctl.errors import InvalidArgument
from vhostctl.service.events import EVENTS
from vhostctl.service.schema import Command, Nothing, describe

CAPABILITIES = "qmp_capabilities"


class Capabilities(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Capabilities of the protocol to enable; there are none."""

    enable: tuple[str, ...] = ()


class Triple(msgspec.Struct, frozen=True):
    """A version; vhostctl's, whatever the key says that clients look for it under."""

    major: int
    minor: int
    micro: int


class Version(msgspec.Struct, frozen=True):
    """The version as QMP's greeting has it."""

    qemu: Triple
    package: str


class CommandInfo(msgspec.Struct, frozen=True):
    """A command that the service knows."""

    name: str
    description: str


def this_version() -> Version:
    """Return the version of this package."""
    text = version("vhostctl")
    return Version(Triple(*map(int, text.split(".")[:3])), f"vhostctl {text}")


def basic_commands(others: Sequence[Command[Any]], end: Callable[[], object]) -> list[Command[Any]]:
    """Return the commands about the protocol; `others` are listed too, `end` ends the service."""
    commands: list[Command[Any]] = [
        Command(
            CAPABILITIES,
            "End the negotiation of capabilities; the first command of every client.",
            Capabilities,
            Nothing,
            _negotiate,
        ),
        Command(
            "query-version",
            "Say which version this is.",
            Nothing,
            Version,
            lambda _: this_version(),
        ),
        Command(
            "query-commands",
            "List the commands.",
            Nothing,
            list[CommandInfo],
            lambda _: [CommandInfo(each.name, each.description) for each in every],
        ),
        Command(
            "query-schema",
            "Describe commands and events as JSON Schema.",
            Nothing,
            dict[str, Any],
            lambda _: describe(every, EVENTS),
        ),
        Command(
            "quit",
            "Take every device down and end the service.",
            Nothing,
            Nothing,
            lambda _: end(),
        ),
    ]
    every = [*commands, *others]
    return commands


def _negotiate(asked: Capabilities) -> None:
    for name in asked.enable:
        raise InvalidArgument(f"capability {name!r} is not available")
