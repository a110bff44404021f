"""The runner: every case in a process of its own, judged against the wanted differences."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vhostctl.conformance import child, flags, wanted
from vhostctl.conformance.case import Case
from vhostctl.conformance.flags import Flags
from vhostctl.conformance.report import ERROR, FAIL, NOT_APPLICABLE, PASS, Difference, Result
from vhostctl.conformance.target import Target
from vhostctl.conformance.wanted import Wanted
from vhostctl.errors import CheckFailed, EnvironmentMissing
from vhostctl.host import vhost
from vhostctl.host.vhost import VhostNet

IN_TREE, MIRROR, ENGINE = "in-tree", "mirror", "engine"

_CHARACTER_DEVICES = Path("/sys/dev/char")
_PROBE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Subject:
    """The device under test: how to open one, which it is, and what it does."""

    opener: Callable[[], VhostNet]
    kind: str
    flags: Flags


def examine(device: str) -> Subject:
    """Open and probe `device`, a node's path or "engine".

    Raises EnvironmentMissing without root, KernelError if it cannot be opened, CheckFailed
    if it cannot be probed.
    """
    if os.geteuid():
        raise EnvironmentMissing("cases make network namespaces and taps", hint="run as root")
    opener = partial(VhostNet.at, device)
    opener().close()  # what is plainly missing is an error of its own class
    kind = ENGINE if device == vhost.ENGINE else _kind_of(device)
    try:
        found = child.call(
            lambda: dataclasses.asdict(flags.probe(opener, node=kind != ENGINE)), _PROBE_SECONDS
        )
    except child.ChildError as error:
        raise CheckFailed(f"{device} could not be probed: {error}") from error
    return Subject(opener, kind, Flags(**found))


def _kind_of(path: str) -> str:
    """Return which vhost-net the node `path` belongs to, by the name of the misc device."""
    number = Path(path).stat().st_rdev
    name = (_CHARACTER_DEVICES / f"{os.major(number)}:{os.minor(number)}").resolve().name
    return MIRROR if name == "vhost-net-mirror" else IN_TREE


def run(cases: Iterable[Case], subject: Subject, listed: Iterable[Wanted]) -> Iterator[Result]:
    """Yield the result of each case, in order; `listed` are the wanted differences.

    The calling process must have one thread only.
    """
    entries = list(listed)
    for case in cases:
        yield wanted.settle(_run_case(case, subject), entries, subject.kind)


def _run_case(case: Case, subject: Subject) -> Result:
    missing = [flag for flag in case.needs if not getattr(subject.flags, flag)]
    if missing:
        return Result(case.group, case.name, NOT_APPLICABLE, problem=f"not {', '.join(missing)}")
    started = time.monotonic()

    def body() -> object:
        with Target(subject.opener, subject.flags) as target:
            case.function(target)
            return [target.observed, [dataclasses.astuple(m) for m in target.mismatches]]

    try:
        observed, mismatches = child.call(body, case.seconds)
    except child.ChildError as error:
        seconds = time.monotonic() - started
        return Result(case.group, case.name, ERROR, problem=str(error), seconds=seconds)
    return Result(
        case.group,
        case.name,
        FAIL if mismatches else PASS,
        observed,
        [Difference(*mismatch) for mismatch in mismatches],
        seconds=time.monotonic() - started,
    )
