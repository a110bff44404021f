"""Open tap queues and vhost devices for a command that has no right to."""

from __future__ import annotations

import os
import pwd
import signal
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NoReturn

from vhostctl.control.netsetup import LinkSettings, link_steps
from vhostctl.control.plan import Plan
from vhostctl.errors import InvalidArgument, kernel_error
from vhostctl.host.links import Links
from vhostctl.host.tap import Tap
from vhostctl.host.vhost import VhostNet


@dataclass(frozen=True, slots=True)
class Descriptors:
    """Descriptor numbers that the command inherits, one of each kind a queue pair."""

    tap: tuple[int, ...]
    vhost: tuple[int, ...]

    def values(self) -> dict[str, str]:
        """Return what replaces each placeholder: numbers joined by colons, as QEMU reads them."""
        return {
            "tapfds": ":".join(map(str, self.tap)),
            "vhostfds": ":".join(map(str, self.vhost)),
        }


def fill_in(argv: Sequence[str], descriptors: Descriptors) -> list[str]:
    """Return `argv` with {tapfds} and {vhostfds} replaced wherever they stand."""
    filled = list(argv)
    for name, value in descriptors.values().items():
        filled = [word.replace(f"{{{name}}}", value) for word in filled]
    return filled


def environment(descriptors: Descriptors) -> dict[str, str]:
    """Return the environment of the command: ours, with TAPFDS and VHOSTFDS."""
    return os.environ | {name.upper(): value for name, value in descriptors.values().items()}


def run(
    argv: Sequence[str],
    *,
    tap: str,
    device: str,
    queues: int,
    settings: LinkSettings,
    user: str | None,
) -> NoReturn:
    """Become `argv` with the descriptors open; does not return.

    The vhost devices are handed over without an owner, so that SET_OWNER happens in the
    command. A tap that is made here is set up by `settings` and goes when the command
    ends; one that was there is used as it is. Raises InvalidArgument (user, settings for
    a tap that exists) and KernelError (tap, device, program); nothing is left then.
    """
    identity = identify(user)
    with ExitStack() as stack:
        opened = stack.enter_context(Tap.open(tap, queues))
        devices = [stack.enter_context(VhostNet.open(device)) for _ in range(queues)]
        if opened.created:
            with Links() as links:
                Plan(link_steps(links, tap, settings)).run()
        elif settings != LinkSettings():
            raise InvalidArgument(f"tap {tap} exists and is used as it is", hint="set it up first")
        become(argv, opened, devices, identity)


def become(
    argv: Sequence[str],
    tap: Tap,
    devices: Sequence[VhostNet],
    identity: pwd.struct_passwd | None = None,
) -> NoReturn:
    """Become `argv` with the queues of `tap` and `devices` open, as `identity` if it is given.

    Raises KernelError (program, privileges); everything is still open then.
    """
    descriptors = Descriptors(
        tuple(queue.fileno() for queue in tap.queues),
        tuple(device.fileno() for device in devices),
    )
    _execute(fill_in(argv, descriptors), descriptors, identity)


def identify(user: str | None) -> pwd.struct_passwd | None:
    """Return the user that has this name or number; None for None. Raises InvalidArgument."""
    if user is None:
        return None
    try:
        return pwd.getpwuid(int(user)) if user.isdigit() else pwd.getpwnam(user)
    except KeyError as error:
        raise InvalidArgument(f"user {user!r}", hint="no such user here") from error


def _execute(
    argv: list[str], descriptors: Descriptors, identity: pwd.struct_passwd | None
) -> NoReturn:
    for fd in (*descriptors.tap, *descriptors.vhost):
        os.set_inheritable(fd, True)
    variables = environment(descriptors)
    if identity is not None:
        _drop_privileges(identity)
        name = identity.pw_name
        variables |= {"HOME": identity.pw_dir, "LOGNAME": name, "USER": name}
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # by Python, and exec would keep that
        signal.signal(ignored, signal.SIG_DFL)
    try:
        os.execvpe(argv[0], argv, variables)  # noqa: S606 -- that is the command's job
    except OSError as error:
        raise kernel_error(error.errno or 0, "exec", argv[0], "check the command") from error


def _drop_privileges(identity: pwd.struct_passwd) -> None:
    try:
        os.initgroups(identity.pw_name, identity.pw_gid)
        os.setgid(identity.pw_gid)
        os.setuid(identity.pw_uid)
    except OSError as error:
        raise kernel_error(error.errno or 0, "setuid", identity.pw_name, "run as root") from error
