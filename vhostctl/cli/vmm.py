"""`vhostctl vmm`: a small VMM whose network is vhost-net's."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from vhostctl.cli import options
from vhostctl.cli.interrupts import taken
from vhostctl.control.features import Policy
from vhostctl.control.netsetup import LinkSettings
from vhostctl.jobs.guests import GuestIdentity
from vhostctl.jobs.vmm import Backend, Vm
from vhostctl.vmm.console import Console, Output
from vhostctl.vmm.machine import End, MachineConfig
from vhostctl.vmm.netconfig import NetConfig

F = TypeVar("F", bound=Callable[..., Any])

_MIB = 1 << 20
_STDIN, _STDOUT, _STDERR = range(3)
_LOOK = 0.5  # seconds
_REASONS = {
    End.POWER_OFF: "guest-shutdown",
    End.RESET: "guest-reset",
    End.QUIT: "host-ui",
}
# Without the second Linux looks for an AGP bridge on 256 buses of what it takes for an old AMD.
_COMMAND_LINE = "console=ttyS0 pci=noearly"


@click.group()
def vmm() -> None:
    """Run virtual machines on /dev/kvm whose network is vhost-net's."""
    # Where one of the three is closed, the next file would be taken for it.
    while (fd := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        pass
    os.close(fd)


def _common(function: F) -> F:
    """Add what both commands have: what the card is wired to, and how events travel."""

    @functools.wraps(function)
    def with_backend(
        *args: Any, tap: str, device: str, settings: LinkSettings, **kwargs: Any
    ) -> Any:
        return function(*args, backend=Backend(tap, device, settings), **kwargs)

    for decorate in (
        click.option("--qmp", type=click.Path(path_type=Path), metavar="SOCKET", help=_QMP),
        click.option("--irqfd/--no-irqfd", default=True, help="Interrupts without this process."),
        click.option(
            "--ioeventfd/--no-ioeventfd", default=True, help="Doorbells without this process."
        ),
        options.link,
        options.node,
        click.option("--tap", required=True, metavar="NAME", help="Tap; made if it is missing."),
    ):
        with_backend = decorate(with_backend)
    return cast(F, with_backend)


_QMP = "Take commands here, as QEMU does: stop, cont, set_link, query-counters, save, quit."
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@vmm.command()
@click.option("--kernel", required=True, type=_FILE, metavar="BZIMAGE", help="Linux, x86-64.")
@click.option("--initrd", type=_FILE, metavar="FILE", help="Its initial file system.")
@click.option("--append", default=_COMMAND_LINE, show_default=True, metavar="TEXT", help="To it.")
@click.option("--cpus", default=1, show_default=True, metavar="N", help="vCPUs.")
@click.option("--memory", default=256, show_default=True, metavar="MIB", help="Guest memory.")
@click.option("--legacy/--no-legacy", default=True, help="Have a BAR for legacy drivers too.")
@options.queues
@options.queue_size
@click.option("--mac", metavar="MAC", help="The card's; derived from the tap's name.")
@options.features
@_common
def run(
    kernel: Path,
    initrd: Path | None,
    append: str,
    cpus: int,
    memory: int,
    legacy: bool,
    queues: int,
    queue_size: int,
    mac: str | None,
    policy: Policy,
    backend: Backend,
    ioeventfd: bool,
    irqfd: bool,
    qmp: Path | None,
) -> None:
    """Boot a Linux kernel, its serial port on this terminal. Ctrl-A x leaves.

    Exit status 0: the guest switched itself off, asked for a reset, or was left.

    \b
    Example: vhostctl vmm run --kernel /boot/vmlinuz --initrd initrd.img \\
               --tap tap0 --addr 192.0.2.1/24 --queues 2 --cpus 2
    """
    config = MachineConfig(memory * _MIB, cpus, irqfd, ioeventfd, legacy)
    address = GuestIdentity.choose(backend.tap, mac, ()).mac.hex(":")
    net = NetConfig(address, backend.link.mtu, queue_size, policy)
    output = Output(_STDOUT)
    boot = functools.partial(Vm.boot, kernel=kernel, initrd=initrd, command_line=append)
    _drive(lambda: boot(config, backend, output.write, net=net, queues=queues), qmp)


@vmm.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@_common
def resume(
    directory: Path, backend: Backend, ioeventfd: bool, irqfd: bool, qmp: Path | None
) -> None:
    """Go on with a machine that QMP's `save` wrote to DIRECTORY.

    The files are read as the guest comes to them: they must stay as they are meanwhile. The
    guest has the card that was saved, and is asked to tell the network where it is now.

    \b
    Example: vhostctl vmm resume /var/tmp/saved --tap tap0
    """
    output = Output(_STDOUT)
    go_on = functools.partial(Vm.resume, irqfd=irqfd, ioeventfd=ioeventfd)
    _drive(lambda: go_on(directory, backend, output.write), qmp)


def _drive(start: Callable[[], Vm], qmp: Path | None) -> None:
    """Have the console and QMP on a machine until it ends."""
    from vhostctl.host.listening import listening

    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    with taken() as interrupts, contextlib.ExitStack() as stack:
        sockets = [] if qmp is None else stack.enter_context(listening(qmp))
        vm = stack.enter_context(start())
        machine = vm.machine
        leave = functools.partial(machine.end, End.QUIT)
        interrupted = interrupts.event.fileno()

        def interrupt() -> None:
            machine.loop.unwatch(interrupted)
            leave()

        machine.loop.watch(interrupted, interrupt)
        with Console(_STDIN, machine.loop, machine.serial, leave):
            if sockets:
                _serve(vm, sockets)
            # A signal that comes just ahead of a wait is seen only when that ends.
            while (ended := machine.wait(_LOOK)) is None:
                pass
        interrupts.check()
        now = vm.counters()
    click.echo(
        f"\n{ended.value}; exits to this process: {now.port_exits} port, "
        f"{now.mmio_exits} MMIO, {now.doorbell_exits} doorbells; "
        f"{now.interrupts_raised} interrupts raised here",
        err=True,
    )


def _serve(vm: Vm, sockets: Sequence[socket.socket]) -> None:
    """Take commands until the machine ends."""
    from vhostctl.service.machine import machine_commands
    from vhostctl.service.qmp import QmpServer

    server = QmpServer(sockets)

    def watch() -> None:
        reason = "host-error"
        with contextlib.suppress(BaseException):  # who waits behind the server gets it too
            reason = _REASONS[vm.machine.wait() or End.QUIT]
        server.end(reason)

    watcher = threading.Thread(target=watch, name="vmm end", daemon=True)
    watcher.start()
    asyncio.run(server.serve(machine_commands(vm), lambda: vm.machine.end(End.QUIT)))
    watcher.join()
