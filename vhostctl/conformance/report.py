"""What a run of the suite found, and what differs between two runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

from vhostctl.errors import InvalidArgument

SCHEMA = "vhostctl.conformance/1"
_ABSENT = "absent"
PASS, FAIL, NOT_APPLICABLE, ERROR = "pass", "fail", "n/a", "error"


@dataclass(frozen=True, slots=True)
class Difference:
    """One observation that is not as the rule has it; `reason` says why, where that is wanted."""

    what: str
    got: object
    want: object
    reason: str = ""

    def __str__(self) -> str:
        text = f"{self.what}: {json.dumps(self.got)}, not {json.dumps(self.want)}"
        return f"{text} (wanted: {self.reason})" if self.reason else text


@dataclass(frozen=True, slots=True)
class Result:
    """Outcome of one case: `status` is pass, fail, n/a or error.

    `observed` maps what the case looked at to what it saw. `problem` is why it is an
    error or not applicable, or which wanted difference did not happen.
    """

    group: str
    name: str
    status: str
    observed: dict[str, object] = field(default_factory=dict)
    mismatches: list[Difference] = field(default_factory=list)
    problem: str = ""
    seconds: float = 0.0

    @property
    def title(self) -> str:
        """Group and sentence."""
        return f"{self.group}: {self.name}"

    @property
    def details(self) -> list[str]:
        """What there is to say beside the status, a line each."""
        return [str(mismatch) for mismatch in self.mismatches] + [self.problem] * bool(self.problem)


@dataclass(frozen=True, slots=True)
class Report:
    """A run: which device, what it does where devices differ, and each case's result."""

    device: str
    kind: str
    kernel: str
    flags: dict[str, bool]
    results: list[Result]

    @property
    def failed(self) -> list[Result]:
        """Cases that did not pass, though they apply."""
        return [result for result in self.results if result.status in (FAIL, ERROR)]

    @property
    def summary(self) -> str:
        """Counts of each status, in a line."""
        counts = dict.fromkeys((PASS, FAIL, ERROR, NOT_APPLICABLE), 0)
        for result in self.results:
            counts[result.status] += 1
        wanted = sum(any(m.reason for m in result.mismatches) for result in self.results)
        text = ", ".join(f"{count} {status}" for status, count in counts.items())
        return f"{len(self.results)} cases: {text}; {wanted} with wanted differences"

    def document(self) -> dict[str, Any]:
        """Return the report as JSON has it."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}

    def junit(self) -> str:
        """Return the report as JUnit's XML."""
        suite = Xml.Element(
            "testsuite",
            name=f"conformance of {self.device}",
            tests=str(len(self.results)),
            failures=str(sum(result.status == FAIL for result in self.results)),
            errors=str(sum(result.status == ERROR for result in self.results)),
            skipped=str(sum(result.status == NOT_APPLICABLE for result in self.results)),
        )
        tags = {FAIL: "failure", ERROR: "error", NOT_APPLICABLE: "skipped"}
        for result in self.results:
            case = Xml.SubElement(
                suite,
                "testcase",
                classname=f"conformance.{result.group}",
                name=result.name,
                time=f"{result.seconds:.3f}",
            )
            if result.status in tags:
                Xml.SubElement(case, tags[result.status], message="; ".join(result.details))
        return Xml.tostring(suite, encoding="unicode", xml_declaration=True)


def load(path: str) -> Report:
    """Read the JSON document of a run. Raises InvalidArgument if `path` holds none."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if data.pop("schema") != SCHEMA:
            raise KeyError
        results = [
            Result(**result | {"mismatches": [Difference(**m) for m in result["mismatches"]]})
            for result in data.pop("results")
        ]
        return Report(**data, results=results)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidArgument(
            f"{path} holds no {SCHEMA} document", hint="write one with `conformance --json`"
        ) from error


def compare(first: Report, second: Report) -> Iterator[tuple[str, str, str, str]]:
    """Yield (case, what, first, second) for every status and observation that differs.

    What only one of the two has is "absent" in the other. Of a case that one of them did not
    come to the end of, or does not have, there is the status only.
    """
    ours, theirs = ({r.title: r for r in report.results} for report in (first, second))
    for title in dict.fromkeys([*ours, *theirs]):
        one, other = ours.get(title), theirs.get(title)
        states = [result.status if result else _ABSENT for result in (one, other)]
        if states[0] != states[1]:
            yield title, "status", states[0], states[1]
        if one and other and {*states} <= {PASS, FAIL}:
            for what, here, there in _sides(one.observed, other.observed):
                yield title, what, here, there


def _sides(one: dict[str, object], other: dict[str, object]) -> Iterator[tuple[str, str, str]]:
    for what in dict.fromkeys([*one, *other]):
        here, there = (json.dumps(s[what]) if what in s else _ABSENT for s in (one, other))
        if here != there:
            yield what, here, there
