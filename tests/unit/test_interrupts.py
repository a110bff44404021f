"""A signal is noted where it comes, and raises where the command ends."""

from __future__ import annotations

import signal

import pytest

from vhostctl.cli.exitcodes import ExitCode
from vhostctl.cli.interrupts import taken

NUMBERS = (signal.SIGINT, signal.SIGTERM)


def test_without_a_signal_nothing_is_raised() -> None:
    before = [signal.getsignal(number) for number in NUMBERS]
    with taken() as interrupts:
        assert not interrupts.event.wait(0)
    interrupts.check()
    assert [signal.getsignal(number) for number in NUMBERS] == before


def interrupted(first: signal.Signals, error: Exception | None = None) -> None:
    """Take three signals, `first` first; each only shows in the event."""
    with taken() as interrupts:
        for number in (first, *NUMBERS):
            signal.raise_signal(number)
            assert interrupts.event.wait(0)
        if error is not None:
            raise error
    interrupts.check()


def test_an_interrupt_is_raised_behind_the_block() -> None:
    before = [signal.getsignal(number) for number in NUMBERS]
    with pytest.raises(KeyboardInterrupt):
        interrupted(signal.SIGINT)
    assert [signal.getsignal(number) for number in NUMBERS] == before


def test_a_termination_is_the_exit_status() -> None:
    with pytest.raises(SystemExit) as caught:
        interrupted(signal.SIGTERM)
    assert caught.value.code == ExitCode.TERMINATED


def test_an_error_of_the_block_goes_first() -> None:
    with pytest.raises(LookupError):
        interrupted(signal.SIGINT, LookupError())


def test_who_ignores_a_signal_goes_on_to() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with taken() as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert not interrupts.event.wait(0)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
