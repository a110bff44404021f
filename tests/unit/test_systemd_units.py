"""The systemd units: that systemd understands them, what they leave open, what they start."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import click
import pytest

from vhostctl.broker import SOCKET
from vhostctl.cli.main import main
from vhostctl.service.state import DEFAULT_STATE, default_socket

UNITS = Path(__file__).parents[2] / "systemd"
NAMES = ["vhostctl", "vhostctl-broker"]
PROGRAM = "/usr/bin/vhostctl"
MOST = 24  # tenths of systemd's exposure, which goes to 10

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="no systemd-analyze: apt install systemd"
)


def settings(unit: str, key: str) -> list[str]:
    """Return the values of `key` in a unit."""
    return re.findall(rf"^{key}=(.*)$", (UNITS / unit).read_text(), re.MULTILINE)


def analyze(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = ["systemd-analyze", "--no-pager", *arguments]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


@needs_systemd
def test_systemd_understands_every_unit(tmp_path: Path) -> None:
    for unit in UNITS.iterdir():
        # It looks for the program, which is not installed here.
        (tmp_path / unit.name).write_text(unit.read_text().replace(PROGRAM, "/bin/true"))
    paths = [str(path) for path in sorted(tmp_path.iterdir())]
    assert len(paths) == 4
    verified = analyze("verify", "--man=no", *paths, cwd=tmp_path)
    assert (verified.returncode, verified.stdout, verified.stderr) == (0, "", "")


@needs_systemd
@pytest.mark.parametrize("name", NAMES)
def test_a_service_leaves_little_open(name: str) -> None:
    unit = f"./{name}.service"
    done = analyze("security", "--offline=true", f"--threshold={MOST}", unit, cwd=UNITS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"exposure level for {name}.service" in done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_a_service_starts_what_there_is(name: str) -> None:
    (line,) = settings(f"{name}.service", "ExecStart")
    program, subcommand, *arguments = shlex.split(line)
    assert program == PROGRAM
    command = main.get_command(click.Context(main), subcommand)
    assert command is not None
    command.make_context(subcommand, arguments).close()  # parses, and runs nothing


def test_the_sockets_are_where_the_clients_look() -> None:
    assert settings("vhostctl-broker.socket", "ListenSequentialPacket") == [SOCKET]
    assert settings("vhostctl.socket", "ListenStream") == [str(default_socket(DEFAULT_STATE))]


@pytest.mark.parametrize("name", NAMES)
def test_a_service_may_open_the_nodes_and_no_others(name: str) -> None:
    nodes = ["/dev/net/tun rw", "/dev/vhost-net rw", "/dev/vhost-net-mirror rw"]
    assert settings(f"{name}.service", "DeviceAllow") == nodes
    assert settings(f"{name}.service", "DevicePolicy") == ["closed"]
