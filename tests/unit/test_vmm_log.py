"""What a guest has device models log is bounded."""

from __future__ import annotations

import logging

import pytest

from vhostctl.vmm.log import Sparing, log


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def record(level: int = logging.WARNING) -> logging.LogRecord:
    return logging.LogRecord("vmm", level, "file", 1, "ring %d", (7,), None)


def test_a_few_messages_pass_in_each_period_and_the_last_one_says_so() -> None:
    clock = Clock()
    sparing = Sparing(3, 10, clock)
    for _ in range(2):
        records = [record() for _ in range(9)]
        passed = [entry.getMessage() for entry in records if sparing.filter(entry)]
        assert passed == ["ring 7", "ring 7", "ring 7 (no more of this for 10 s)"]
        clock.now += 9.9
        assert not sparing.filter(record())
        clock.now += 0.1


def test_what_is_for_debugging_is_not_counted() -> None:
    sparing = Sparing(2, 10, Clock())
    assert all(sparing.filter(record(logging.DEBUG)) for _ in range(9))
    assert sparing.filter(record())


def test_the_log_of_the_models_is_sparing(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(1000):
        log.warning("again")
    assert len(caplog.records) < 100
