"""The cache and the directories that vanish with their maker; children that do, too."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vhostctl.errors import EnvironmentMissing
from vhostctl.lab import cache, process


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/user")
    monkeypatch.delenv("VHOSTCTL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache.directory() == Path("/home/user/.cache/vhostctl")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache.directory() == Path("/xdg/vhostctl")
    monkeypatch.setenv("VHOSTCTL_CACHE", "own")
    monkeypatch.chdir(tmp_path)
    assert cache.directory() == tmp_path / "own"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VHOSTCTL_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_scratch_vanishes(own: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with cache.scratch() as directory:
            (directory / "half").touch()
            raise error

    with pytest.raises(error):
        fail()
    assert list(own.iterdir()) == []


def test_only_what_the_dead_left_is_swept(own: Path) -> None:
    (own / ".scratch-dead").mkdir()
    (own / ".scratch-dead" / "half").touch()
    (own / "kernels").mkdir()
    with cache.scratch() as first:
        assert not (own / ".scratch-dead").exists()
        with cache.scratch() as second:
            assert first.exists()
            assert second != first
    assert list(own.iterdir()) == [own / "kernels"]


def test_a_full_disk_is_told(own: Path) -> None:
    with (
        pytest.raises(EnvironmentMissing, match=f"{own}: no space left; free some"),
        cache.scratch(),
        open("/dev/full", "wb", buffering=0) as full,
    ):
        full.write(b"x")
    assert list(own.iterdir()) == []


def test_a_cache_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VHOSTCTL_CACHE", "/dev/null/cache")
    with pytest.raises(EnvironmentMissing, match="set VHOSTCTL_CACHE"), cache.scratch():
        pass


def test_a_missing_program_comes_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(EnvironmentMissing) as caught:
        process.program("no-such-program", "apt install it")
    assert str(caught.value) == "no-such-program is not installed; apt install it"


def test_programs_are_found_where_only_root_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/sbin:/bin")
    assert process.search_path() == "/usr/sbin:/bin:/usr/local/sbin:/sbin"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_dies_with_its_owner(number: signal.Signals) -> None:
    owner = (
        "from vhostctl.lab import process\n"
        "script = 'echo $$; exec tail -f /dev/null'\n"
        "with process.owned(['sh', '-c', script]) as child: child.wait()\n"
    )
    with subprocess.Popen([sys.executable, "-c", owner], stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        child = os.pidfd_open(int(running.stdout.readline()))
        running.send_signal(number)
    try:
        assert select.select([child], [], [], 10)[0], "the child is still there"
    finally:
        os.close(child)


def test_output_and_complaint() -> None:
    assert process.output_of(["sh", "-c", "echo $LC_ALL"]) == "C.UTF-8\n"
    with pytest.raises(subprocess.CalledProcessError) as caught:
        process.output_of(["sh", "-c", "echo no >&2; exit 3"])
    assert (caught.value.returncode, caught.value.stderr) == (3, "no\n")
