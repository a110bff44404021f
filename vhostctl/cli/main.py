"""The vhostctl command: finds subcommands, turns errors into exit statuses."""

from __future__ import annotations

import importlib
import signal
from types import FrameType
from typing import Any

import click

from vhostctl.cli.exitcodes import ExitCode, exit_code
from vhostctl.errors import VhostctlError, kernel_error

_COMMANDS = (
    "bench",
    "broker",
    "conformance",
    "doctor",
    "down",
    "kmod",
    "lab",
    "list",
    "migrate",
    "probe",
    "run",
    "selftest",
    "service",
    "status",
    "up",
    "vmm",
    "workers",
)


class _Refused(click.ClickException):
    """A VhostctlError on its way out: one line on stderr."""

    def __init__(self, error: VhostctlError) -> None:
        super().__init__(str(error))
        self.error = error

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        """What click ends the process with."""
        return exit_code(self.error)


class _Main(click.Group):
    """Imports a subcommand when it is named: start-up counts inside an emulated VM."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        command = getattr(importlib.import_module(f"vhostctl.cli.{cmd_name}"), cmd_name)
        return command if isinstance(command, click.Command) else None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except VhostctlError as error:
            raise _Refused(error) from error
        except BrokenPipeError:
            raise  # click ends quietly when nobody reads any more
        except OSError as error:
            target = str(error.filename or "vhostctl")
            raise _Refused(kernel_error(error.errno or 0, "system call", target)) from error
        except KeyboardInterrupt:
            ctx.exit(ExitCode.INTERRUPTED)


def _terminate(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    raise SystemExit(ExitCode.TERMINATED)


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="vhostctl")
def main() -> None:
    """QEMU's role for the kernel's vhost-net: wire taps to it, test it, measure it.

    Exit status: 0 done; 1 the kernel or the operation failed; 2 wrong usage; 3 something
    that is needed is missing; 4 a check found a difference; 130 interrupted, 143 terminated.
    """
    signal.signal(signal.SIGTERM, _terminate)
