"""A throw-away VM: boot a kernel on this machine's root, run one command, bring its result back."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from vhostctl.errors import InvalidArgument
from vhostctl.lab import accel, cache, compose, process
from vhostctl.lab.accel import Accel
from vhostctl.lab.compose import Boot, Command
from vhostctl.lab.guest import Guest, LostMachineError, TimeLimitError
from vhostctl.lab.kernels import Kernel
from vhostctl.lab.relay import Ports, Sink, Wires, discard

__all__ = ["LostMachineError", "Machine", "TimeLimitError"]

DEFAULT_TIMEOUT = 600.0
"""Seconds that a command and the boot before it may take."""

_LEAST_MEMORY = 256  # MiB; a Debian kernel with its initramfs and the tmpfs layers


@dataclass(frozen=True)
class Machine:
    """A VM to boot, as often as wanted, from several threads if wanted.

    `memory` is in MiB. `icount` makes the guest's clock count instructions, one a nanosecond, on
    one CPU of the emulator. `accel` is auto, kvm or tcg; None asks $VHOSTCTL_ACCEL. The guest sees
    the host's root, and its writes there stay in its memory; what it writes to the directories in
    `share` reaches the host. `notice` gets a line when the VM runs otherwise than was asked.
    `append` is added to the kernel's command line.
    Raises InvalidArgument for values that cannot work.
    """

    kernel: Kernel
    cpus: int | None = None
    memory: int = 1024
    icount: bool = False
    accel: str | None = None
    share: tuple[Path, ...] = ()
    notice: Callable[[str], object] = lambda _line: None
    append: str = ""

    def __post_init__(self) -> None:
        if self.cpus is not None and self.cpus < 1:
            raise InvalidArgument(f"{self.cpus} CPUs: a VM needs one at least")
        if self.icount and (self.cpus or 1) > 1:
            raise InvalidArgument("instructions are counted on one CPU", hint="leave cpus out")
        if self.memory < _LEAST_MEMORY:
            raise InvalidArgument(f"{self.memory} MiB: a VM needs {_LEAST_MEMORY} at least")
        for path in self.share:
            if not path.is_absolute() or not path.is_dir() or "\n" in str(path):
                raise InvalidArgument(f"cannot share {path}: not the absolute path of a directory")
            if path in (Path("/"), *compose.OWN_DIRECTORIES):
                raise InvalidArgument(f"cannot share {path}: the guest needs its own")
        if "--" in self.append.split() or "\n" in self.append:
            raise InvalidArgument("what is appended has to be options of the kernel, in one line")

    def run(
        self,
        argv: Sequence[str],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float | None = DEFAULT_TIMEOUT,
        stdin: int | None = None,
        stdout: Sink = discard,
        stderr: Sink = discard,
        console: Sink | None = None,
    ) -> int:
        """Boot, run `argv` as root in `cwd`, and return its exit status, 128 + n for signal n.

        The command has PATH, HOME, the locale and `env`, and VHOSTCTL_LAB set to the release.
        `stdin` is a descriptor to read from, None for an empty input. The sinks get its output
        as it comes; `console` makes the kernel talk and gets what it says. `timeout` is in
        seconds and includes the boot.

        Raises LostMachineError if the VM ends without a status, TimeLimitError when the time is up,
        EnvironmentMissing for a missing program, InvalidArgument if the guest cannot see `cwd`.
        Whatever is raised, also by a sink, the VM is gone then.
        """
        # A random hash seed alone moves a Python loop's instruction count by 4 %.
        fixed = {"PYTHONHASHSEED": "0"} if self.icount else {}
        command = self._command(argv, cwd, fixed | dict(env or {}), stdin=stdin is not None)
        deadline = None if timeout is None else time.monotonic() + timeout
        return self._boot(command, Wires(stdin, stdout, stderr, console), deadline)

    def shell(self, argv: Sequence[str], *, cwd: Path | None = None) -> int:
        """Boot with this terminal as the VM's, run `argv` on it and return its exit status.

        Raises InvalidArgument where stdin or stdout is no terminal, and as `run` does.
        """
        if not sys.stdin.isatty() or not sys.stdout.isatty():
            raise InvalidArgument("a shell needs a terminal", hint="use vhostctl lab run")
        command = self._command(argv, cwd, {}, terminal=True)
        settings = termios.tcgetattr(sys.stdin)
        try:
            return self._boot(command, None, None)
        finally:
            # QEMU made the terminal raw, and was killed.
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, settings)

    def _command(
        self, argv: Sequence[str], cwd: Path | None, env: Mapping[str, str], **inputs: bool
    ) -> Command:
        if not argv:
            raise InvalidArgument("no command to run")
        for name in env:
            if not name.isidentifier():
                raise InvalidArgument(f"{name!r} cannot name a variable in a shell")
        directory = (cwd or Path.cwd()).absolute()
        compose.check_visible(directory, self.share)
        return Command(tuple(argv), directory, env, **inputs)

    def _boot(self, command: Command, wires: Wires | None, deadline: float | None) -> int:
        """Boot on the accelerator that is to be had; `wires` is None for the terminal."""
        on = accel.choose(self.accel, icount=self.icount)
        try:
            status = self._boot_on(on, command, wires, deadline)
        except LostMachineError as error:
            if on is not Accel.TRIAL or error.started:
                raise
            self.notice("no VM comes up on this host's KVM; it is emulated, now and from now on")
            status = self._boot_on(Accel.TCG, command, wires, deadline)
            accel.remember(works=False)  # the same VM came up without it: KVM was to blame
            return status
        if on is Accel.TRIAL:
            accel.remember(works=True)
        return status

    def _boot_on(
        self, on: Accel, command: Command, wires: Wires | None, deadline: float | None
    ) -> int:
        # A control character first: hardly any output waits for what may turn out to be the marker.
        marker = f"\x04{secrets.token_hex(16)}"
        with ExitStack() as stack:
            directory = stack.enter_context(cache.scratch())
            compose.check_visible(directory, self.share)
            compose.write_guest_files(directory, self.kernel, self.share, command, marker)
            boot = Boot(
                self.kernel,
                self.cpus or default_cpus(icount=self.icount),
                self.memory,
                on,
                self.icount,
                self.share,
                directory,
                verbose=wires is not None and wires.console is not None,
                append=self.append,
            )
            ports = stack.enter_context(Ports())
            argv = compose.qemu_command(boot, ports.inherited)
            # Not our process group: an interrupt from the terminal is ours to handle.
            apart = {
                "stdin": subprocess.DEVNULL,
                "stdout": subprocess.PIPE,
                "stderr": subprocess.STDOUT,
                "process_group": 0,
            }
            descriptors = tuple(ports.inherited.values())
            qemu = stack.enter_context(
                process.owned(argv, pass_fds=descriptors, **(apart if wires else {}))
            )
            ports.hand_over()
            guest = stack.enter_context(Guest(qemu, ports, wires, marker.encode()))
            return guest.converse(deadline, accel.TRIAL_SECONDS if on is Accel.TRIAL else None)


def default_cpus(*, icount: bool = False) -> int:
    """Return how many CPUs a VM gets: two where the host has them, one to count instructions."""
    return 1 if icount else min(2, os.cpu_count() or 1)
