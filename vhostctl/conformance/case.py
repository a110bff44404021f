"""Cases: one rule each, in one sentence, registered by the module that holds them."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from vhostctl.conformance import cases as package
from vhostctl.conformance.flags import Flags
from vhostctl.conformance.target import Target
from vhostctl.errors import InvalidArgument

SECONDS = 180.0
"""Bound for one case: generous, as an emulated machine is slow and a loaded one slower."""

_FLAGS = frozenset(field.name for field in dataclasses.fields(Flags))
_registry: dict[str, Case] = {}


@dataclass(frozen=True, slots=True)
class Case:
    """One rule. `needs` are the flags that must be true for it to apply; `seconds` its bound."""

    group: str
    name: str
    function: Callable[[Target], None]
    needs: tuple[str, ...] = ()
    seconds: float = SECONDS

    @property
    def title(self) -> str:
        """Group and sentence: unique, and what wanted.toml calls the case."""
        return f"{self.group}: {self.name}"


def case(
    name: str, *, needs: tuple[str, ...] = (), seconds: float = SECONDS
) -> Callable[[Callable[[Target], None]], Callable[[Target], None]]:
    """Register the decorated function as the case `name` of its module's group.

    Raises InvalidArgument for a name that the group has already, or an unknown flag.
    """

    def register(function: Callable[[Target], None]) -> Callable[[Target], None]:
        new = Case(function.__module__.rpartition(".")[2], name, function, needs, seconds)
        unknown = set(needs) - _FLAGS
        if unknown:
            raise InvalidArgument(f"case {new.title!r}: no flag {', '.join(sorted(unknown))}")
        known = _registry.setdefault(new.title, new)
        if known.function is not function:
            raise InvalidArgument(f"case {new.title!r} exists already")
        return function

    return register


def all_cases() -> list[Case]:
    """Return every case: groups in order of their names, cases as they are written."""
    for module in sorted(found.name for found in pkgutil.iter_modules(package.__path__)):
        importlib.import_module(f"{package.__name__}.{module}")
    return sorted(_registry.values(), key=lambda case: case.group)


def select(cases: Iterable[Case], word: str) -> list[Case]:
    """Return the cases whose group or name contains `word`, in any case.

    Raises InvalidArgument if there is none.
    """
    found = [case for case in cases if word.lower() in case.title.lower()]
    if not found:
        raise InvalidArgument(f"no case has {word!r} in its group or name")
    return found
