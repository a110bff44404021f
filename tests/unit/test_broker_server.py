"""The broker's loop and socket: what a bad caller costs, and whom."""

from __future__ import annotations

import json
import logging
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vhostctl.broker import server
from vhostctl.broker.client import request
from vhostctl.broker.peer import Peer
from vhostctl.broker.policy import Policy
from vhostctl.broker.protocol import LONGEST, Refused
from vhostctl.broker.server import SILENT, Broker, listener
from vhostctl.errors import InvalidArgument

NOTHING = Policy(())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "broker.sock"


@pytest.fixture
def broker(path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Broker]:
    caplog.set_level(logging.INFO)
    with listener(path) as sock, Broker(sock, NOTHING) as running:
        yield running


def connected(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(10)
    sock.connect(str(path))
    return sock


def answered(broker: Broker, path: Path, data: bytes) -> dict[str, str]:
    """Send `data` as a caller and return what the broker says."""
    with connected(path) as sock:
        broker.step(10)
        sock.send(data)
        broker.step(10)
        answer: dict[str, str] = json.loads(sock.recv(LONGEST))
        assert sock.recv(1) == b""
    return answer


def test_the_credentials_are_the_kernels(path: Path, broker: Broker) -> None:
    with connected(path):
        broker.step(10)
        (caller,) = broker._callers.values()
        assert caller.peer == Peer(
            os.getpid(), os.getuid(), frozenset({os.getgid(), *os.getgroups()})
        )


@pytest.mark.skipif(os.geteuid() != 0, reason="not root: setgroups")
@pytest.mark.parametrize("count", [0, 1, 300, 65536])
def test_every_group_of_the_caller_is_seen(count: int) -> None:
    script = (
        "import os, socket, sys; from vhostctl.broker.peer import Peer\n"
        f"os.setgroups(range(1000, 1000 + {count}))\n"
        "near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        f"sys.exit(Peer.of(near).gids != {{os.getgid(), *range(1000, 1000 + {count})}})"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_a_refusal_is_answered_and_logged(
    path: Path, broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    answer = answered(broker, path, b'{"tap": "vm-0"}')
    assert answer["answer"] == "refused"
    assert answer["message"].startswith("no rule names ")
    (line,) = caplog.messages
    assert line.startswith("refused to ")
    assert f"uid {os.getuid()}" in line
    assert f"pid {os.getpid()}" in line


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\0" * 100, "no request"),
        (b"{" + b" " * LONGEST, f"longer than {LONGEST} bytes"),
        (b'{"tap": "a", "evil\\u000aline": 1}', "no request"),
    ],
)
def test_garbage_costs_its_sender_the_connection(
    path: Path, broker: Broker, caplog: pytest.LogCaptureFixture, data: bytes, text: str
) -> None:
    with connected(path) as patient:
        broker.step(10)
        assert text in answered(broker, path, data)["message"]
        assert caplog.messages[-1].isprintable()
        patient.send(b"{}")  # the other caller still has its turn
        broker.step(10)
        assert b"no rule names" in patient.recv(LONGEST)


def test_descriptors_that_a_caller_sends_are_not_taken(path: Path, broker: Broker) -> None:
    with connected(path) as sock:
        broker.step(10)
        before = len(list(Path("/proc/self/fd").iterdir()))
        socket.send_fds(sock, [b"{}"], [0] * 50)
        broker.step(10)
        assert len(list(Path("/proc/self/fd").iterdir())) == before - 1  # its connection


def test_a_silent_caller_is_dropped_in_time(
    path: Path, broker: Broker, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "PATIENCE", 0.05)
    with connected(path) as sock:
        broker.step(10)
        broker.step(None)
        assert sock.recv(1) == b""
    assert "no request within" in caplog.messages[-1]
    assert not broker._callers


def test_a_user_has_few_silent_connections(path: Path, broker: Broker) -> None:
    silent = [connected(path) for _ in range(SILENT)]
    try:
        for _ in silent:
            broker.step(10)
        with connected(path) as one_more:
            broker.step(10)
            assert b"wait already" in one_more.recv(LONGEST)
        silent.pop().close()
        broker.step(10)
        assert answered(broker, path, b"{}")["answer"] == "refused"
    finally:
        for sock in silent:
            sock.close()


@pytest.mark.parametrize("after", [b"", b"{}"])
def test_a_caller_may_leave_at_any_time(path: Path, broker: Broker, after: bytes) -> None:
    with connected(path) as sock:
        broker.step(10)
        if after:
            sock.send(after)
    broker.step(10)
    assert not broker._callers
    assert answered(broker, path, b"{}")["answer"] == "refused"


def test_out_of_descriptors_those_who_wait_make_room(
    path: Path, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connected(path) as waiting:
        broker.step(10)

        def accept() -> None:
            raise OSError(24, "Too many open files")

        with monkeypatch.context() as patched, connected(path):
            patched.setattr(broker, "_listener", type("", (), {"accept": staticmethod(accept)}))
            broker._accept()
        assert waiting.recv(1) == b""


def test_the_socket_is_everybodys_and_goes(path: Path) -> None:
    with listener(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666
        with pytest.raises(InvalidArgument, match="somebody listens on"), listener(path):
            pass
    assert not path.exists()


def test_a_socket_that_was_left_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(str(path))
    with listener(path), connected(path):
        pass


# systemd's part: a socket as descriptor 3, and the two variables, of the process itself.
ACTIVATED = """
import os, sys
from pathlib import Path
from vhostctl.broker.server import listener
given = os.dup(int(sys.argv[3]))  # it may be among those that are replaced
for number in range(int(sys.argv[2])):
    os.dup2(given, 3 + number)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=sys.argv[2])
with listener(Path("/nowhere/at/all")) as sock:
    print(sock.getsockname() == sys.argv[1], sock.get_inheritable(), "LISTEN_PID" in os.environ)
"""


def activated(sock: socket.socket, count: int = 1) -> subprocess.CompletedProcess[str]:
    arguments = [str(sock.getsockname()), str(count), str(sock.fileno())]
    return subprocess.run(
        [sys.executable, "-c", ACTIVATED, *arguments],
        pass_fds=[sock.fileno()],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_systemd_hands_its_socket_over(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(str(path))
        sock.listen()
        done = activated(sock)
        assert done.stdout.split() == ["True", "False", "False"], done.stderr
        assert "a broker takes one" in activated(sock, 2).stderr
    assert path.exists()  # it is systemd's
    path.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(str(path))
        sock.listen()
        assert "ListenSequentialPacket" in activated(sock).stderr


def test_without_a_broker_the_client_says_what_to_start(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="systemctl start vhostctl-broker"):
        request(path, tap="vm-0")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(str(path))
        with pytest.raises(OSError, match="start one"):
            request(path, tap="vm-0")


def test_the_client_does_not_wait_for_ever(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vhostctl.broker import client

    monkeypatch.setattr(client, "PATIENCE", 0.05)
    with listener(path), pytest.raises(TimeoutError, match="does not answer"):
        request(path, tap="vm-0")


def test_the_client_keeps_no_descriptor_of_a_wrong_answer(path: Path) -> None:
    answer = b'{"answer":"granted","tap":"vm-0","created":true}'
    for data in (answer, b"garbage", b'{"answer":"refused","message":"no"}'):
        with listener(path) as sock:
            before = len(list(Path("/proc/self/fd").iterdir()))
            with pytest.raises((InvalidArgument, Refused)):
                _ask_of(sock, path, data)
            assert len(list(Path("/proc/self/fd").iterdir())) == before


def _ask_of(listener: socket.socket, path: Path, data: bytes) -> None:
    """Ask a broker that answers `data` with three descriptors, whatever it is asked."""
    from concurrent.futures import ThreadPoolExecutor

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(LONGEST)
            socket.send_fds(connection, [data], [0, 1, 2])

    with ThreadPoolExecutor(1) as pool:
        serving = pool.submit(serve)
        try:
            request(path, tap="vm-0", queues=2)
        finally:
            serving.result()
