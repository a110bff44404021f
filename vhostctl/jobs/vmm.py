"""A virtual machine with one network card on vhost-net, from a command's words to its end."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
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
class Card:
    """The network card: its tap, and `queues` vhost devices, each with a queue of the tap.

    `link` is what the host's side of the tap is to have.
    """

    tap: str
    net: NetConfig
    device: str = DEFAULT_PATH
    queues: int = 1
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
        card: Card,
        output: Output,
        *,
        kernel: Path,
        initrd: Path | None = None,
        command_line: str = "",
    ) -> Self:
        """Boot a Linux bzImage. Raises InvalidArgument, NegotiationError and KernelError."""
        with ExitStack() as stack:
            ram = stack.enter_context(fresh_ram(config.memory))
            made = _devices(stack, card)
            machine = stack.enter_context(Machine(config, ram, output))
            nic = _plug(machine, made, card)
            machine.boot(kernel, initrd, command_line)
            return cls._go(stack, machine, nic)

    @classmethod
    def resume(
        cls,
        directory: Path,
        card: Card,
        output: Output,
        *,
        irqfd: bool = True,
        ioeventfd: bool = True,
    ) -> Self:
        """Go on with what `save` wrote to `directory`; the guest sees the card that it had.

        Raises InvalidArgument, NegotiationError and KernelError.
        """
        state = MachineState.load(directory)
        if len(state.nics) != 1:
            raise InvalidArgument(f"{directory}: {len(state.nics)} network cards, not one")
        nic_state = state.nics[0].device
        card = replace(card, net=replace(card.net, mtu=nic_state.mtu))
        with ExitStack() as stack:
            ram = stack.enter_context(suspend.saved_ram(state, directory))
            made = _devices(stack, card)
            config = state.config(irqfd=irqfd, ioeventfd=ioeventfd)
            machine = stack.enter_context(Machine(config, ram, output))
            nic = _plug(machine, made, card, nic_state.tap_offer)
            suspend.restore(machine, [nic], state)
            return cls._go(stack, machine, nic)

    @classmethod
    def _go(cls, stack: ExitStack, machine: Machine, nic: NetDevice) -> Self:
        machine.start()
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


def _devices(stack: ExitStack, card: Card) -> tuple[Tap, list[VhostNet]]:
    tap = stack.enter_context(Tap.open(card.tap, card.queues))
    links = Links()
    stack.callback(links.close)
    links.open()
    plan = Plan(link_steps(links, tap.name, card.link))
    stack.callback(plan.undo)
    devices = [
        stack.enter_context(VhostNet.at(card.device, f"{card.device} (pair {pair})"))
        for pair in range(card.queues)
    ]
    plan.run()
    return tap, devices


def _plug(
    machine: Machine,
    made: tuple[Tap, list[VhostNet]],
    card: Card,
    tap_offer: int | None = None,
) -> NetDevice:
    nic = NetDevice(machine.space, *made, card.net, tap_offer)
    machine.add(nic)
    return nic
