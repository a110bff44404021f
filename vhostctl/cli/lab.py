"""`vhostctl lab`: throw-away VMs with a real kernel."""

from __future__ import annotations

import math
import os
import re
import select
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vhostctl.cli import render
from vhostctl.cli.exitcodes import ExitCode
from vhostctl.errors import VhostctlError
from vhostctl.lab import initrd, kernels
from vhostctl.lab.relay import Sink
from vhostctl.lab.vm import DEFAULT_TIMEOUT, LostMachineError, Machine, TimeLimitError

_CONSOLE_LINES = 15

if TYPE_CHECKING:
    _Integer = click.ParamType[int]
else:
    _Integer = click.ParamType  # generic in newer versions of click only


class _Memory(_Integer):
    """A size such as 1024, 512M or 1G, as MiB."""

    name = "size"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        match = re.fullmatch(r"(\d+)([MG]?)", str(value), re.IGNORECASE)
        if match is None:
            self.fail(f"{value!r} is not a size such as 1024, 512M or 1G", param, ctx)
        return int(match[1]) * (1024 if match[2].upper() == "G" else 1)


def _notice(line: str) -> None:
    click.echo(f"vhostctl: {line}", err=True)


def _writer(fd: int, timeout: float) -> Sink:
    """Return a sink that writes to a descriptor, and waits for its reader within the limit."""
    deadline = time.monotonic() + timeout
    poll = select.poll()
    poll.register(fd, select.POLLOUT)

    def write(data: bytes) -> None:
        while data:
            left = max(0.0, deadline - time.monotonic())
            if not poll.poll(math.ceil(left * 1000)):
                raise TimeLimitError("the time limit was reached: nobody reads the output")
            data = data[os.write(fd, data[: select.PIPE_BUF]) :]

    return write


_kernel = click.option(
    "-k", "--kernel", required=True, metavar="NAME", help="A series such as 6.12, or a release."
)
_accel = click.option(
    "--accel", type=click.Choice(["auto", "kvm", "tcg"]), help="Default: $VHOSTCTL_ACCEL, or auto."
)
_cpus = click.option("--cpus", type=int, metavar="N", help="Default: 2 where the host has them.")
_memory = click.option("--memory", type=_Memory(), default="1024", help="In MiB, or with M or G.")
_append = click.option(
    "--append", default="", metavar="OPTIONS", help="More for the kernel's command line."
)
_share = click.option(
    "--share",
    type=click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path),
    multiple=True,
    help="A directory that the guest may write to; can be repeated.",
)


@click.group()
def lab() -> None:
    """Boot throw-away VMs with Debian's kernels on this machine's root."""


@lab.command()
@click.option("--missing", is_flag=True, help="Only series that the cache lacks; no network else.")
@click.option("--headers", is_flag=True, help="Also what modules for it are built with.")
@click.argument("series", nargs=-1, required=True)
def fetch(series: Sequence[str], missing: bool, headers: bool) -> None:
    """Bring the newest kernel of each SERIES into the cache, without root.

    \b
    Example: vhostctl lab fetch 6.1 6.12 7.2

    The packages come through this machine's own mirrors; nothing is installed. The cache is
    $VHOSTCTL_CACHE, or vhostctl below $XDG_CACHE_HOME or ~/.cache.
    """
    if missing:
        # Only the newest of a series counts, as for -k.
        newest = {kernel.series: kernel for kernel in kernels.installed()}
        there = {name for name, kernel in newest.items() if kernel.has_headers or not headers}
        series = [name for name in series if name not in there]
        if not series:
            return

    from rich.console import Console
    from rich.progress import Progress, TaskID

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def progress(what: str, percent: float) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=100)
            bar.update(tasks[what], completed=percent)

        fetched = kernels.fetch(*series, with_headers=headers, progress=progress)
    for kernel in fetched:
        click.echo(f"{kernel.series}: {kernel.release} in {kernel.tree}")


@lab.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON document.")
def list_kernels(as_json: bool) -> None:
    """List the kernels that can be fetched, and those that were.

    \b
    Example: vhostctl lab list --json | jq -r '.kernels[] | select(.fetched) | .release'
    """
    found = kernels.installed()
    missing = [series for series in kernels.SERIES if series not in {k.series for k in found}]
    entries: list[dict[str, str | bool | None]] = [
        {
            "series": k.series,
            "release": k.release,
            "path": str(k.tree),
            "image": str(k.image),
            "fetched": True,
            "headers": k.has_headers,
        }
        for k in found
    ]
    entries += [
        {"series": series, "release": None, "path": None, "image": None, "fetched": False}
        | {"headers": False}
        for series in missing
    ]
    if as_json:
        render.json_document("lab.list/1", {"kernels": entries})
        return
    rows = [
        [str(e["series"]), str(e["release"] or "not fetched"), str(e["path"] or "")]
        for e in entries
    ]
    render.table(rows, header=("series", "release", "path"))


@lab.command(context_settings={"allow_interspersed_args": False})
@_kernel
@_cpus
@_memory
@click.option(
    "--icount", is_flag=True, help="Count instructions: one is a nanosecond of guest time."
)
@_accel
@click.option(
    "--timeout", type=click.FloatRange(min=0, min_open=True), default=DEFAULT_TIMEOUT,
    show_default=True, metavar="SECONDS", help="For the boot and the command.",
)  # fmt: skip
@_share
@_append
@click.option("-v", "--console", is_flag=True, help="Show the kernel's console on stderr.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_context
def run(
    ctx: click.Context,
    kernel: str,
    cpus: int | None,
    memory: int,
    icount: bool,
    accel: str | None,
    timeout: float,
    share: tuple[Path, ...],
    append: str,
    console: bool,
    command: Sequence[str],
) -> None:
    """Boot a kernel and run COMMAND in the VM, as root.

    \b
    Example: vhostctl lab run -k 6.12 -- uname -a

    The guest has this machine's root, and what it writes is gone with it, but for --share; it has
    a /run of its own. Input that is not a terminal is passed on.

    Exit status: COMMAND's own; 124 the time limit was reached; 125 the VM was lost; 3 something
    that is needed is missing; 130 interrupted.
    """
    machine = Machine(
        kernels.find(kernel), cpus, memory, icount, accel, share, notice=_notice, append=append
    )
    try:
        status = machine.run(
            command,
            timeout=timeout,
            stdin=None if sys.stdin is None or os.isatty(0) else 0,
            stdout=_writer(1, timeout),
            stderr=_writer(2, timeout),
            console=_writer(2, timeout) if console else None,
        )
    except TimeLimitError as error:
        _complain(error)
        status = ExitCode.TIME_LIMIT
    except LostMachineError as error:
        status = _lost(error, shown=console)
    ctx.exit(status)


@lab.command()
@_kernel
@_cpus
@_memory
@_accel
@_share
@click.pass_context
def shell(
    ctx: click.Context,
    kernel: str,
    cpus: int | None,
    memory: int,
    accel: str | None,
    share: tuple[Path, ...],
) -> None:
    """Boot a kernel with a shell on this terminal; leave it to end the VM.

    \b
    Example: vhostctl lab shell -k 7.2
    """
    machine = Machine(kernels.find(kernel), cpus, memory, accel=accel, share=share, notice=_notice)
    try:
        status = machine.shell([os.environ.get("SHELL", "/bin/sh")])
    except LostMachineError as error:
        status = _lost(error, shown=True)
    ctx.exit(status)


@lab.command("initrd")
@_kernel
@click.option(
    "--add",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    metavar="FILE",
    help="A file that the guest has too, a program with its libraries; can be repeated.",
)
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
def write_initrd(kernel: str, add: tuple[Path, ...], out: Path) -> None:
    """Write to OUT an initramfs for a guest with this kernel and nothing else.

    \b
    Example: vhostctl lab initrd -k 6.12 --add /usr/bin/iperf3 guest.cpio

    The guest has busybox, loads the kernel's own virtio_pci and virtio_net, gives eth0 the
    address of vhostctl.ip=192.0.2.2/24 on the kernel's command line (`network` does so again,
    for a driver that was loaded again) and runs a shell on its console.
    """
    initrd.write(kernels.find(kernel), out, add)


def _lost(error: LostMachineError, *, shown: bool) -> int:
    for line in () if shown else error.console[-_CONSOLE_LINES:]:
        click.echo(line, err=True)
    _complain(error)
    return ExitCode.VM_LOST


def _complain(error: VhostctlError) -> None:
    click.echo(f"Error: {error}", err=True)
