"""Every rule of the conformance suite, on the device that --device names."""

from __future__ import annotations

import dataclasses

import pytest

from vhostctl.conformance import run, wanted
from vhostctl.conformance.case import Case, all_cases
from vhostctl.conformance.flags import Flags
from vhostctl.conformance.report import NOT_APPLICABLE, PASS
from vhostctl.conformance.run import Subject
from vhostctl.conformance.wanted import Wanted


@pytest.fixture(scope="session")
def subject(device: str) -> Subject:
    return run.examine(device)


@pytest.fixture(scope="session")
def listed() -> list[Wanted]:
    return wanted.read()


def test_ours_do_what_the_newest_does(subject: Subject) -> None:
    """What a device of ours stopped doing must not turn into cases that do not apply."""
    if subject.kind == run.IN_TREE:
        expected = set()
    else:
        expected = {field.name for field in dataclasses.fields(Flags)} - {"fork_from_owner"}
        expected -= {"node"} if subject.kind == run.ENGINE else set()
    done = {name for name, value in dataclasses.asdict(subject.flags).items() if value}
    assert expected <= done


# A case that does not apply passes: what the device is like was asked of it, and the table
# of `vhostctl conformance` shows it.
@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.title)
def test_rule(case: Case, subject: Subject, listed: list[Wanted]) -> None:
    (result,) = run.run([case], subject, listed)
    assert result.status in (PASS, NOT_APPLICABLE), "\n".join(result.details)
