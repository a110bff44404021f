"""A signal is noted where it comes, and raises where the command ends."""

from __future__ import annotations

import signal

import pytest

from vhostctl.cli.exitcodes import ExitCode
from vhostctl.cli.interrupts import taken
from vhostctl.errors import InvalidArgument

NUMBERS = (signal.SIGINT, signal.SIGTERM)


def test_without_a_signal_nothing_is_raised() -> None:
    before = [signal.getsignal(number) for number in NUMBERS]
    with taken() as interrupts:
        assert not interrupts.event.wait(0)
    interrupts.check()
    assert [signal.getsignal(number) for number in NUMBERS] == before


def interrupted(*numbers: signal.Signals, error: Exception | None = None) -> None:
    """Take signals, which only show in the event."""
    with taken() as interrupts:
        for number in numbers:
            signal.raise_signal(number)
            assert interrupts.event.wait(0)
        if error is not None:
            raise error
    interrupts.check()


def test_the_first_signal_counts_and_none_behind_it() -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted(signal.SIGINT, signal.SIGTERM)
    for number in NUMBERS:
        signal.raise_signal(number)


def test_a_termination_is_the_exit_status() -> None:
    with pytest.raises(SystemExit) as caught:
        interrupted(signal.SIGTERM, signal.SIGINT)
    assert caught.value.code == ExitCode.TERMINATED


def test_who_insists_is_heard_at_once() -> None:
    with taken() as interrupts:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert interrupts.came


@pytest.mark.parametrize(
    ("error", "raised"),
    [(InvalidArgument("the kernel gave up"), KeyboardInterrupt), (LookupError(), LookupError)],
)
def test_our_errors_give_way_to_the_signal(error: Exception, raised: type[BaseException]) -> None:
    with pytest.raises(raised):
        interrupted(signal.SIGINT, error=error)


def test_our_errors_pass_without_a_signal() -> None:
    before = [signal.getsignal(number) for number in NUMBERS]
    with pytest.raises(InvalidArgument):
        interrupted(error=InvalidArgument("the kernel gave up"))
    assert [signal.getsignal(number) for number in NUMBERS] == before
