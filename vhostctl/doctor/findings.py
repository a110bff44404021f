"""What a check can find: faults with stable codes, and one of them found with its evidence."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Severity(enum.StrEnum):
    """How much a fault costs: error: vhost-net cannot be used; warning: part of it; note."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Finding:
    """A fault that this machine has.

    `evidence` names the file and the value, `remedy` is a command to type, or a sentence where
    no command helps. `fix` is the command that `vhostctl doctor --fix` may run, or empty.
    """

    fault: Fault
    evidence: str
    remedy: str
    fix: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that can be wrong; `code` never changes, `remedy` is what helps in general."""

    code: str
    severity: Severity
    meaning: str
    remedy: str

    def found(self, evidence: str, remedy: str = "", fix: tuple[str, ...] = ()) -> Finding:
        """Return the finding; without `remedy` it is the general one."""
        return Finding(self, evidence, remedy or self.remedy, fix)


def error(code: str, meaning: str, remedy: str) -> Fault:
    """Return a fault with which vhost-net cannot be used."""
    return Fault(code, Severity.ERROR, meaning, remedy)


def warning(code: str, meaning: str, remedy: str) -> Fault:
    """Return a fault that limits what can be done."""
    return Fault(code, Severity.WARNING, meaning, remedy)


def note(code: str, meaning: str, remedy: str) -> Fault:
    """Return a fault that most do not mind."""
    return Fault(code, Severity.NOTE, meaning, remedy)
