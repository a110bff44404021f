"""Where one listens, what is left there, and what systemd hands over and is told."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from vhostctl.errors import InvalidArgument, KernelError
from vhostctl.host.listening import listening, notify

INHERITED = """
import os, sys
from pathlib import Path
from vhostctl.host.listening import listening
os.dup2(int(sys.argv[2]), 3)
os.environ["LISTEN_PID"] = str(os.getpid())
try:
    with listening(Path(sys.argv[1])) as sockets:
        print([each.getsockname() for each in sockets], os.get_inheritable(3))
        print([name for name in os.environ if name.startswith("LISTEN_")])
except Exception as error:
    print(type(error).__name__, error)
"""


def connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except OSError:
            return False
    return True


def test_the_socket_is_its_owners_and_goes(tmp_path: Path) -> None:
    path = tmp_path / "control"
    with listening(path) as (bound,):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert connects(path)
        assert not bound.get_inheritable()
    assert not path.exists()


def test_a_socket_of_nobody_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "control"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    with listening(path):
        assert connects(path)
    assert not path.exists()


def test_a_socket_of_somebody_stays(tmp_path: Path) -> None:
    path = tmp_path / "control"
    with listening(path):
        with pytest.raises(InvalidArgument, match="listens on"), listening(path):
            pass
        assert connects(path)


def test_a_socket_whose_backlog_is_full_stays(tmp_path: Path) -> None:
    path = tmp_path / "control"
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as first:
        busy.bind(str(path))
        busy.listen(0)
        first.connect(str(path))
        with pytest.raises(InvalidArgument, match="listens on"), listening(path):
            pass


def test_the_file_of_a_successor_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "control"
    with listening(path):
        path.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
    assert path.is_socket()


def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "control"
    path.write_text("precious")
    with pytest.raises(InvalidArgument, match="no socket"), listening(path):
        pass
    assert path.read_text() == "precious"


def test_paths_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match=r"bind on .*nowhere"), listening(tmp_path / "nowhere/s"):
        pass
    with pytest.raises(InvalidArgument, match="shorter"), listening(tmp_path / ("x" * 120)):
        pass
    with pytest.raises(InvalidArgument, match="no socket"), listening(None):
        pass


@pytest.mark.parametrize(
    ("kind", "listens", "expected"),
    [
        (socket.SOCK_STREAM, True, "[{path!r}] False\n[]\n"),
        (socket.SOCK_STREAM, False, "EnvironmentMissing descriptor 3 "),
        (socket.SOCK_SEQPACKET, True, "EnvironmentMissing descriptor 3 "),
    ],
)
def test_a_socket_of_systemd_is_taken_and_its_file_stays(
    tmp_path: Path, kind: socket.SocketKind, listens: bool, expected: str
) -> None:
    path = tmp_path / "systemds"
    with socket.socket(socket.AF_UNIX, kind) as handed:
        handed.bind(str(path))
        if listens:
            handed.listen()
        done = subprocess.run(
            [sys.executable, "-c", INHERITED, str(tmp_path / "own"), str(handed.fileno())],
            env={**os.environ, "LISTEN_FDS": "1", "LISTEN_FDNAMES": "qmp"},
            pass_fds=[handed.fileno()],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
    assert done.stdout.startswith(expected.format(path=str(path))), done.stderr
    assert path.is_socket()
    assert not (tmp_path / "own").exists()


def test_sockets_of_another_process_are_none_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LISTEN_PID", str(os.getppid()))
    monkeypatch.setenv("LISTEN_FDS", "1")
    with listening(tmp_path / "own") as (bound,):
        assert bound.getsockname() == str(tmp_path / "own")


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    address = f"@vhostctl-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(address.replace("@", "\0"))
        systemd.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        notify("READY=1")
        assert systemd.recv(100) == b"READY=1"
    notify("STOPPING=1")  # nobody listens: no matter
