"""Markers, and the check of what was skipped against a committed list."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from vhostctl.host.vhost import DEFAULT_PATH

_skipped: dict[str, str] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--allowed-skips",
        metavar="FILE",
        help="fail the run if a test is skipped that FILE does not list (a node id or file a line)",
    )

    parser.addoption(
        "--device",
        metavar="DEVICE",
        default=DEFAULT_PATH,
        help="the vhost-net that system and conformance tests use: a node, or engine",
    )

    parser.addoption(
        "--seconds",
        metavar="N",
        type=float,
        default=float(os.environ.get("VHOSTCTL_TEST_SECONDS", "2")),
        help="how long each load test keeps its load up (make soak: 60)",
    )


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    """A command takes signals for the rest of its process; the tests' process goes on."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def seconds(request: pytest.FixtureRequest) -> float:
    """What `--seconds` says."""
    return float(request.config.getoption("--seconds"))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """What `--device` says."""
    return str(request.config.getoption("--device"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "vm: boots a virtual machine")
    config.addinivalue_line("markers", "xdist_group(name): in one process, where there are several")
    config.addinivalue_line("markers", "soak: in a VM only in `make test-all`: it is long")
    # A shell's background job ignores ctrl-C, and so would the programs that are tested.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped:
        _skipped[report.nodeid] = str(report.longrepr)


def pytest_sessionfinish(session: pytest.Session) -> None:
    listing = session.config.getoption("--allowed-skips")
    if listing is None:
        return
    allowed = set(Path(str(listing)).read_text(encoding="utf-8").split())
    surprises = sorted(n for n in _skipped if not {n, n.partition("::")[0]} & allowed)
    for node in surprises:
        print(f"\nskipped, and not on the list {listing}: {node}: {_skipped[node]}")
    if surprises:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
