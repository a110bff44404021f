"""What a command and an event are: names, types, a description, and the errors of QMP."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec

from vhostctl.errors import InvalidArgument

A = TypeVar("A")

_PLACE = re.compile(r"(?P<what>.*) - at `\$\.?(?P<path>[^`]*)`", re.DOTALL)
_REFERENCE = "#/definitions/{name}"


class CommandNotFound(InvalidArgument):
    """There is no such command, or not at this point of the conversation."""


class DeviceNotFound(InvalidArgument):
    """There is no device of that name."""


class Nothing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """No arguments; nothing to return."""


@dataclass(frozen=True, slots=True)
class Command(Generic[A]):
    """A command: `arguments` is the Struct that `run` gets, `result` the type it returns.

    Where `result` is Nothing, `run` may return None.
    """

    name: str
    description: str
    arguments: type[A]
    result: Any
    run: Callable[[A], object]

    def call(self, arguments: Mapping[str, object]) -> object:
        """Return run(arguments). Raises InvalidArgument (names the argument) and what it raises."""
        try:
            converted = msgspec.convert(arguments, self.arguments)
        except msgspec.ValidationError as error:
            raise InvalidArgument(f"{self.name}: {_blame(str(error))}") from error
        result = self.run(converted)
        return Nothing() if result is None else result


def _blame(message: str) -> str:
    """Return msgspec's message with the argument that it is about in front."""
    found = _PLACE.fullmatch(message)
    return f"argument '{found['path']}': {found['what']}" if found else message


def describe(commands: Iterable[Command[Any]], events: Mapping[str, type]) -> dict[str, object]:
    """Return the schema: JSON Schema (2020-12) of every command's types and every event's data."""
    commands = list(commands)
    types = [each for command in commands for each in (command.arguments, command.result)]
    types += events.values()
    schemas, definitions = msgspec.json.schema_components(types, ref_template=_REFERENCE)
    described = iter(schemas)
    return {
        "commands": [
            {
                "name": command.name,
                "description": command.description,
                "arguments": next(described),
                "result": next(described),
            }
            for command in commands
        ],
        "events": [{"name": name, "data": next(described)} for name in events],
        "definitions": definitions,
    }
