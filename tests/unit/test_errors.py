"""The exception tree: the built-in class fits the errno, and the text says what to do."""

from __future__ import annotations

import errno
import os
import pickle

import pytest

from vhostctl.cli.exitcodes import ExitCode, exit_code
from vhostctl.errors import (
    CheckFailed,
    EnvironmentMissing,
    InvalidArgument,
    KernelError,
    NegotiationError,
    StateError,
    VhostctlError,
    kernel_error,
)
from vhostctl.host.vhost import VhostNet


@pytest.mark.parametrize(
    "number",
    [
        errno.EPERM,
        errno.EACCES,
        errno.ENOENT,
        errno.EEXIST,
        errno.EAGAIN,
        errno.EISDIR,
        errno.ENOTDIR,
        errno.ESRCH,
        errno.EINTR,
        errno.ETIMEDOUT,
        errno.EINVAL,
    ],
)
def test_the_class_is_also_what_oserror_would_pick(number: int) -> None:
    error = kernel_error(number, "VHOST_SET_OWNER", "/dev/vhost-net")
    assert isinstance(error, type(OSError(number, "x")))
    assert isinstance(error, KernelError)
    assert error.errno == number


def test_the_text_says_what_which_why_and_what_to_do() -> None:
    error = kernel_error(errno.EBUSY, "VHOST_SET_OWNER", "/dev/vhost-net", "open it again")
    assert str(error) == (
        f"VHOST_SET_OWNER on /dev/vhost-net: {os.strerror(errno.EBUSY)} (EBUSY); open it again"
    )
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # noqa: S301


def test_a_missing_node_names_the_module(tmp_path: os.PathLike[str]) -> None:
    with pytest.raises(FileNotFoundError, match=r"open on .*: .* \(ENOENT\); check the path"):
        VhostNet.open(os.path.join(tmp_path, "vhost-net"))  # noqa: PTH118


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidArgument("x"), ExitCode.USAGE),
        (EnvironmentMissing("x"), ExitCode.MISSING),
        (CheckFailed("x"), ExitCode.DIFFERENT),
        (StateError("x"), ExitCode.FAILED),
        (NegotiationError("x"), ExitCode.FAILED),
        (kernel_error(errno.ENOENT, "open", "x"), ExitCode.MISSING),
        (kernel_error(errno.EPERM, "TUNSETIFF", "x"), ExitCode.MISSING),
        (kernel_error(errno.EBUSY, "TUNSETIFF", "x"), ExitCode.FAILED),
    ],
)
def test_exit_codes(error: VhostctlError, code: ExitCode) -> None:
    assert exit_code(error) is code
