"""Configuration files: TOML into typed structs, with errors that name file, line and key."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from vhostctl.errors import InvalidArgument, kernel_error

T = TypeVar("T")

_SYNTAX = re.compile(r"(?P<what>.*) \(at line (?P<line>\d+), column \d+\)", re.DOTALL)
_PLACE = re.compile(r"(?P<what>.*) - at `(?:key in )?\$(?P<path>.*)`", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<key>.*)`")
_BLAMED = re.compile(r"(?P<path>[\w.\[\]-]+): (?P<what>.*)", re.DOTALL)
_PART = re.compile(r"\.?(?P<key>[^.\[\]]+)|\[(?P<index>\d+)\]")


def load(path: Path, kind: type[T]) -> T:
    """Return what the TOML file `path` says, as the msgspec Struct `kind`.

    Raises InvalidArgument that names file, line and key (``net.toml:12: device[1].queues:
    Expected `int`, got `str` ``), and KernelError if the file cannot be read. What a struct's
    ``__post_init__`` raises may begin with the key that it blames and a colon.
    """
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise kernel_error(error.errno or 0, "read", str(path), "check the path") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InvalidArgument(f"{path}:{line}: not UTF-8") from error
    return loads(text, kind, str(path))


def loads(text: str, kind: type[T], name: str) -> T:
    """Return what `text` says, as `load()`; `name` stands for the file in errors."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidArgument(f"{name}:{_syntax(text, str(error))}") from error
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise InvalidArgument(f"{name}:{_place(text, str(error))}") from error


def _syntax(text: str, message: str) -> str:
    found = _SYNTAX.fullmatch(message)
    if found is None:  # "at end of document"
        return f"{text.rstrip().count(chr(10)) + 1}: {message}"
    return f"{found['line']}: {found['what']}"


def _place(text: str, message: str) -> str:
    """Return line, key and what is wrong with it, of msgspec's `message`."""
    found = _PLACE.fullmatch(message)
    what, place = (found["what"], found["path"]) if found else (message, "")
    path = _path(place.partition("[...]")[0])
    if unknown := _UNKNOWN.fullmatch(what):
        path.append(unknown["key"])
        what = "unknown key"
    elif (blamed := _BLAMED.fullmatch(what)) and _line(text, path + _path(blamed["path"])):
        path += _path(blamed["path"])
        what = blamed["what"]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return ": ".join(filter(None, (str(_line(text, path) or 1), key.removeprefix("."), what)))


def _path(text: str) -> list[str | int]:
    return [
        part["key"] if part["index"] is None else int(part["index"])
        for part in _PART.finditer(text)
    ]


def _line(text: str, path: Sequence[str | int]) -> int | None:
    """Return the line where `path` begins: tomllib tells no lines, but takes any whole part.

    The path is there from the end of its value on; its value begins after what was whole
    before that.
    """
    lines = text.splitlines(keepends=True)
    whole = 0
    for count in range(1, len(lines) + 1):
        try:
            data = tomllib.loads("".join(lines[:count]))
        except tomllib.TOMLDecodeError:
            continue
        if path and _has(data, path):
            return whole + 1
        whole = count
    return None


def _has(data: Any, path: Sequence[str | int]) -> bool:
    for part in path:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return False
    return True
