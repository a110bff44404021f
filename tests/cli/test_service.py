"""The commands that ask a service, where none runs: usage, errors and their exit statuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from vhostctl.cli.exitcodes import ExitCode
from vhostctl.cli.main import main

BAD = '[[device]]\nname = "demo"\ntap = "tap0"\nqueues = "two"\n'


def vhostctl(*args: str | Path) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["up"], "NAME and --tap are missing, or -f."),
        (["up", "demo"], "NAME and --tap are missing, or -f."),
        (["up", "demo", "--tap", "tap0", "--json"], "--json goes with --detach or -f."),
        (["up", "-f", "FILE", "--tap", "tap0"], "-f says it all: leave --tap out."),
        (["up", "demo", "-f", "FILE"], "-f says it all: leave name out."),
        (["up", "-f", "FILE"], "net.toml:4: device[0].queues: Expected `int`, got `str`"),
        (["service", "-f", "FILE"], "net.toml:4: device[0].queues: Expected `int`, got `str`"),
        (["down", "-f", "FILE"], "net.toml:4: device[0].queues: Expected `int`, got `str`"),
        (["down", "demo", "-f", "FILE"], "names and a file; give one or the other"),
        (["list", "demo"], "unexpected extra argument"),
    ],
)
def test_wrong_usage_attempts_nothing(tmp_path: Path, args: list[str], text: str) -> None:
    file = tmp_path / "net.toml"
    file.write_text(BAD)
    state = tmp_path / "state"
    given = [str(file) if arg == "FILE" else arg for arg in args]
    result = vhostctl(*given, "--state", state)
    assert (result.exit_code, text in result.stderr) == (ExitCode.USAGE, True), result.stderr
    assert not state.exists()


@pytest.mark.parametrize("command", ["down", "list", "status"])
def test_without_a_service_something_is_missing(tmp_path: Path, command: str) -> None:
    result = vhostctl(command, "--state", tmp_path)
    assert result.exit_code == ExitCode.MISSING
    assert f"no service listens at {tmp_path}/qmp.sock" in result.stderr


def test_the_socket_may_be_anywhere(tmp_path: Path) -> None:
    result = vhostctl("list", "--state", tmp_path, "--socket", tmp_path / "else")
    assert f"no service listens at {tmp_path}/else" in result.stderr


def test_a_service_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a socket")
    args = ("up", "demo", "--detach", "--tap", "tap0", "--device", "engine", "--state", tmp_path)
    result = vhostctl(*args, "--socket", tmp_path / "file")
    assert result.exit_code == ExitCode.FAILED
    assert f"no service could be started: {tmp_path}/file " in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    result = vhostctl("list", "--socket", tmp_path / "file" / "under")
    assert "Not a directory (ENOTDIR); check the path" in result.stderr
