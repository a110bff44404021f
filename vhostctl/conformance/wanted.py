"""Differences from the in-tree device that are wanted, each with its reason, from one file."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.resources import files

from vhostctl.conformance.report import FAIL, PASS, Difference, Result
from vhostctl.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class Wanted:
    """On devices of `kinds`, `case` observes `value` for `what`, for this `reason`."""

    kinds: frozenset[str]
    case: str
    what: str
    value: object
    reason: str


def read(text: str | None = None) -> list[Wanted]:
    """Return the entries of `text`, or of the package's file. Raises InvalidArgument."""
    if text is None:
        text = files(__package__).joinpath("wanted.toml").read_text(encoding="utf-8")
    try:
        found = tomllib.loads(text).get("difference", [])
        return [Wanted(**entry | {"kinds": frozenset(entry["kinds"])}) for entry in found]
    except (tomllib.TOMLDecodeError, TypeError, KeyError, AttributeError) as error:
        raise InvalidArgument(f"wanted.toml: {error}") from error


def check_titles(wanted: Iterable[Wanted], titles: Iterable[str]) -> None:
    """Raise InvalidArgument if an entry of `wanted` is about a case that does not exist."""
    known = set(titles)
    for entry in wanted:
        if entry.case not in known:
            raise InvalidArgument(f"wanted.toml: there is no case {entry.case!r}")


def settle(result: Result, wanted: Iterable[Wanted], kind: str) -> Result:
    """Return `result` with the differences that are wanted for `kind` taken as passed.

    One that is listed and did not happen makes it fail.
    """
    listed = {w.what: w for w in wanted if kind in w.kinds and w.case == result.title}
    if not listed or result.status not in (PASS, FAIL):
        return result
    mismatches = [_explain(mismatch, listed) for mismatch in result.mismatches]
    missed = sorted(listed.keys() - {m.what for m in mismatches if m.reason})
    return replace(
        result,
        mismatches=mismatches,
        status=FAIL if missed or not all(m.reason for m in mismatches) else PASS,
        problem=f"wanted.toml lists what did not happen: {', '.join(missed)}" if missed else "",
    )


def _explain(mismatch: Difference, listed: dict[str, Wanted]) -> Difference:
    entry = listed.get(mismatch.what)
    if entry is None or entry.value != mismatch.got:
        return mismatch
    return replace(mismatch, reason=entry.reason)
