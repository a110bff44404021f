"""Where the lab keeps what it fetched, and directories that vanish with their maker."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vhostctl.errors import EnvironmentMissing

_SCRATCH = ".scratch-"


def directory() -> Path:
    """Return the cache: $VHOSTCTL_CACHE, or vhostctl below $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("VHOSTCTL_CACHE"):
        return Path(own).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "vhostctl"


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Make a directory in the cache for the length of the block.

    It is locked while its maker lives, so one that a killed process left behind is known as
    such, and the next call removes it. Raises EnvironmentMissing for a cache that cannot be
    written, and for running out of space inside the block.
    """
    cache = directory()
    with contextlib.ExitStack() as stack:
        path = _make(cache, stack)
        try:
            yield path
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise no_space(cache) from error


def _make(cache: Path, stack: contextlib.ExitStack) -> Path:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache):
            _sweep(cache)
            path = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=cache))
            stack.callback(shutil.rmtree, path, ignore_errors=True)
            stack.enter_context(_locked(path))
    except OSError as error:
        raise EnvironmentMissing(
            f"{cache}: {error.strerror}", hint="set VHOSTCTL_CACHE to a directory you can write"
        ) from error
    return path


def no_space(path: Path, wanted: str = "") -> EnvironmentMissing:
    """Return the error for a file system that has no space left, or not as much as is wanted."""
    return EnvironmentMissing(
        f"{path}: no space left{wanted and f' ({wanted})'}",
        hint="free some, or set VHOSTCTL_CACHE to another disk",
    )


def _sweep(cache: Path) -> None:
    """Remove the scratch directories whose makers are gone."""
    for path in cache.glob(f"{_SCRATCH}*"):
        with contextlib.suppress(OSError), _locked(path, fcntl.LOCK_NB):
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path, flags: int = 0) -> Iterator[None]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | flags)
        yield
    finally:
        os.close(fd)
