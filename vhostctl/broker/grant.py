"""What a request gets: descriptors, opened in the broker's name as far as the policy allows."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from vhostctl.broker.peer import Peer
from vhostctl.broker.policy import Policy, Rule
from vhostctl.broker.protocol import Request
from vhostctl.broker.taps import LinkInfo, LinkTable, check_alone, check_theirs, claim, take
from vhostctl.control.netsetup import LinkSettings, link_steps
from vhostctl.control.plan import Plan
from vhostctl.errors import InvalidArgument, kernel_error
from vhostctl.host.tap import Tap
from vhostctl.host.vhost import VhostNet


@dataclass(frozen=True, slots=True)
class Grant:
    """A tap and as many devices as it has queues; `bridge` is the one that the tap is on."""

    tap: Tap
    devices: tuple[VhostNet, ...]
    device: str
    bridge: str | None

    def descriptors(self) -> list[int]:
        """Return the tap's queues, then the devices; they stay owned by these objects."""
        return [queue.fileno() for queue in self.tap.queues] + [
            device.fileno() for device in self.devices
        ]

    def __str__(self) -> str:
        made = "made" if self.tap.created else "there before"
        bridge = f", on bridge {self.bridge}" if self.bridge else ""
        return f"tap {self.tap.name} ({made}){bridge}, {len(self.devices)} x {self.device}"


@contextmanager
def granted(policy: Policy, peer: Peer, request: Request) -> Iterator[Grant]:
    """Open what `request` asks for; at the end of the with block the broker's copies close.

    If the block fails, what was done to a tap that was there before is taken back; one that was
    made goes. Raises Refused, InvalidArgument (a tap that cannot serve) and KernelError.
    """
    rule = policy.rule(peer, request.tap)
    rule.check(request)
    with LinkTable() as links, ExitStack() as stack:
        there = links.all()
        name = request.tap if request.tap is not None else rule.free_name(there)
        bridge, joins = _bridge(rule, name, there.get(name), request.bridge)
        if name in there:
            check_theirs(peer, name, there[name])
        else:
            rule.check_count(sum(link.alias == claim(peer.uid) for link in there.values()))
        tap = stack.enter_context(Tap.open(name, request.queues))
        if tap.created is (name in there):
            raise kernel_error(errno.EAGAIN, "open", name, "it came or went meanwhile: ask again")
        if tap.created:
            take(links, tap, peer)
        check_alone(links, tap)
        devices = tuple(
            stack.enter_context(VhostNet.open(request.device)) for _ in range(request.queues)
        )
        if rule.terms.fork_from_owner is not None:
            for device in devices:
                device.set_fork_from_owner(rule.terms.fork_from_owner)
        plan = Plan(link_steps(links, name, LinkSettings(bridge=bridge if joins else None)))
        plan.run()
        try:
            yield Grant(tap, devices, request.device, bridge)
        except BaseException:
            plan.undo()
            raise


def _bridge(
    rule: Rule, name: str, link: LinkInfo | None, asked: str | None
) -> tuple[str | None, bool]:
    """Return the bridge that the tap will be on, and whether it has to join it.

    Raises Refused for a bridge that it is on and that the rule does not name: a tap that is
    there already gives no more than one that is made.
    """
    if link is None or not link.master:
        return asked, asked is not None
    present = socket.if_indextoname(link.master)
    rule.check_bridge(present)
    if asked not in (None, present):
        raise InvalidArgument(f"tap {name} is on bridge {present}", hint="ask for that, or none")
    return present, False
