"""A virtual machine with one network card on vhost-net, from a command's words to its end."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from vhostctl.control.netsetup import LinkSettings, link_steps
from vhostctl.control.plan import Plan
from vhostctl.errors import InvalidArgument
from vhostctl.host.closing import Closing
from vhostctl.host.links import Links
from vhostctl.host.tap import Tap
from vhostctl.host.vhost import DEFAULT_PATH, VhostNet
from vhostctl.vmm import suspend
from vhostctl.vmm.machine import Counters, End, Machine, MachineConfig, fresh_ram
from vhostctl.vmm.net import NetDevice
from vhostctl.vmm.netconfig import NetConfig
from vhostctl.vmm.suspend import MachineState

Output = Callable[[bytes], None]

NIC = "net0"
"""What the network card is called in commands."""


@dataclass(frozen=True, slots=True)
class Backend:
    """What a network card is wired to: a tap, and a vhost device for each of its queues.

    `link` is what the host's side of the tap is to have.
    """

    tap: str
    device: str = DEFAULT_PATH
    link: LinkSettings = field(default_factory=LinkSettings)


class Vm(Closing):
    """A running machine and its card; a context manager that ends both."""

    def __init__(self, machine: Machine, nic: NetDevice, stack: ExitStack) -> None:
        """See `boot` and `resume`, which make one; `stack` closes what it stands on."""
        self.machine = machine
        self._nic = nic
        self._stack = stack

    @classmethod
    def boot(
        cls,
        config: MachineConfig,
        backend: Backend,
        output: Output,
        *,
        net: NetConfig,
        queues: int = 1,
        kernel: Path,
        initrd: Path | None = None,
        command_line: str = "",
    ) -> Self:
        """Boot a Linux bzImage; its card has `queues` pairs of queues.

        Raises InvalidArgument, NegotiationError and KernelError.
        """
        with ExitStack() as stack:
            ram = stack.enter_context(fresh_ram(config.memory))
            made = _devices(stack, backend, queues)
            machine = stack.enter_context(Machine(config, ram, output))
            nic = NetDevice(machine.space, *made, net)
            machine.add(nic)
            machine.boot(kernel, initrd, command_line)
            return cls._go(stack, machine, nic)

    @classmethod
    def resume(
        cls,
        directory: Path,
        backend: Backend,
        output: Output,
        *,
        irqfd: bool = True,
        ioeventfd: bool = True,
    ) -> Self:
        """Go on with what `save` wrote to `directory`; the guest sees the card that it had.

        It is asked to tell the network where it is now. If it was paused it stays so.

        Raises InvalidArgument, NegotiationError and KernelError.
        """
        state = MachineState.load(directory)
        if len(state.nics) != 1:
            raise InvalidArgument(f"{directory}: {len(state.nics)} network cards, not one")
        card = state.nics[0].device
        with ExitStack() as stack:
            ram = stack.enter_context(suspend.saved_ram(state, directory))
            made = _devices(stack, backend, card.pairs)
            config = state.config(irqfd=irqfd, ioeventfd=ioeventfd)
            machine = stack.enter_context(Machine(config, ram, output))
            nic = NetDevice(machine.space, *made, card.config, card.tap_offer)
            machine.add(nic)
            suspend.restore(machine, [nic], state)
            with machine.lock:
                nic.announce()
            return cls._go(stack, machine, nic, running=state.running)

    @classmethod
    def _go(
        cls, stack: ExitStack, machine: Machine, nic: NetDevice, *, running: bool = True
    ) -> Self:
        machine.start()
        if running:
            machine.resume()
        return cls(machine, nic, stack.pop_all())

    def set_link(self, up: bool) -> None:
        """Take the card's link down or up; the guest is told. Raises KernelError."""
        with self.machine.lock:
            self._nic.set_link(up)

    def save(self, directory: Path) -> None:
        """Write everything to `directory`, then end the machine; see vmm/suspend.py.

        If it fails the machine goes on. Raises KernelError.
        """
        suspend.save(self.machine, [self._nic], directory)
        self.machine.end(End.QUIT)

    def counters(self) -> Counters:
        """Return what left the guest for this process."""
        return self.machine.counters()

    def close(self) -> None:
        """End the machine, then let go of tap, devices and memory."""
        self._stack.close()


def _devices(stack: ExitStack, backend: Backend, queues: int) -> tuple[Tap, list[VhostNet]]:
    tap = stack.enter_context(Tap.open(backend.tap, queues))
    links = Links()
    stack.callback(links.close)
    links.open()
    plan = Plan(link_steps(links, tap.name, backend.link))
    stack.callback(plan.undo)
    devices = [
        stack.enter_context(VhostNet.at(backend.device, f"{backend.device} (pair {pair})"))
        for pair in range(queues)
    ]
    plan.run()
    return tap, devices
