"""A virtio network device whose rings vhost-net serves: virtio 1.2, section 5.1."""

from __future__ import annotations

import contextlib
import functools
import operator
import struct
import time
from collections.abc import Sequence

from vhostctl.abi import virtio
from vhostctl.control.addressspace import AddressSpace
from vhostctl.control.features import Policy, mask, negotiate, tap_features
from vhostctl.control.netsetup import parse_mac
from vhostctl.control.session import Session
from vhostctl.control.states import State
from vhostctl.control.wiring import SessionConfig
from vhostctl.errors import InvalidArgument, KernelError, NegotiationError, VhostctlError
from vhostctl.host.closing import Closing
from vhostctl.host.eventfd import EventFd
from vhostctl.host.tap import Tap
from vhostctl.host.vhost import VhostNet
from vhostctl.vmm.ctrlqueue import ControlQueue
from vhostctl.vmm.log import log
from vhostctl.vmm.netcommands import MAC_SIZE, answer
from vhostctl.vmm.netconfig import NetConfig, NetState
from vhostctl.vmm.netrings import Handed, handed, pairs_set_up, placed
from vhostctl.vmm.virtio import Ring, Transport

VIRTIO_ID_NET = 1
CONTROL_SIZE = 64
"""Descriptors of the control queue: a command has at most a handful."""

# The transport has no registers for these two.
_UNDERSTOOD = (1 << 64) - 1 & ~mask(virtio.VIRTIO_F_NOTIFICATION_DATA, virtio.VIRTIO_F_RING_RESET)
_CONFIG = struct.Struct("<6sHHH")
_SERVED = mask(
    virtio.VIRTIO_NET_F_MAC,
    virtio.VIRTIO_NET_F_STATUS,
    virtio.VIRTIO_NET_F_CTRL_VQ,
    virtio.VIRTIO_NET_F_CTRL_RX,
    virtio.VIRTIO_NET_F_CTRL_RX_EXTRA,
    virtio.VIRTIO_NET_F_CTRL_MAC_ADDR,
    virtio.VIRTIO_NET_F_GUEST_ANNOUNCE,
)
_DRAIN = 0.2
"""Seconds that pairs that are switched off may take, all of them that one doorbell is rung for:
the vCPU that asked for it waits, and others with it."""


class NetDevice(Closing):
    """A network device on `tap` and one vhost device for each of the tap's queues.

    Memory, tap and devices stay the caller's. It implements vmm.virtio.VirtioDevice: vhost
    has the rings from `start()` to `reset()`, and the control queue is answered here.
    """

    device_id = VIRTIO_ID_NET

    def __init__(
        self,
        space: AddressSpace,
        tap: Tap,
        vhost: Sequence[VhostNet],
        config: NetConfig,
        tap_offer: int | None = None,
    ) -> None:
        """Ask tap and devices what they offer; `tap_offer` spares the tap the question.

        Raises InvalidArgument unless there is a device for each queue of the tap, KernelError
        and NegotiationError (what the policy requires is not there).
        """
        if len(tap.queues) != len(vhost):
            raise InvalidArgument(f"{len(tap.queues)} tap queues and {len(vhost)} vhost devices")
        self._space, self._tap, self._vhost, self._config = space, tap, tuple(vhost), config
        self._mac = parse_mac(config.mac)
        self._served = _SERVED | mask(
            *[virtio.VIRTIO_NET_F_MQ] * (len(vhost) > 1),
            *[virtio.VIRTIO_NET_F_MTU] * (config.mtu is not None),
        )
        for device in vhost:
            if not device.owned:
                device.set_owner()
        self._offer = functools.reduce(operator.and_, (device.get_features() for device in vhost))
        self._tap_offer = tap_features(tap.queues[0].offloads()) if tap_offer is None else tap_offer
        self.features = self._settle(_UNDERSTOOD, config.policy)
        self._transport: Transport | None = None
        self._session: Session | None = None
        self._control: ControlQueue | None = None
        self._control_at = 2 * len(vhost)
        self._link = True
        self._announcing = False
        self._wanted_pairs = 1
        self._drained_by = 0.0
        with contextlib.ExitStack() as stack:
            self._kicks, self.errors, self.calls = (
                [stack.enter_context(EventFd.create(f"{kind} of queue {n}")) for n in range(count)]
                for kind, count in (
                    ("kick", 2 * len(vhost)),
                    ("error", 2 * len(vhost)),
                    ("call", 2 * len(vhost) + 1),
                )
            )
            self.config_call = stack.enter_context(EventFd.create("call of the configuration"))
            self._events = stack.pop_all()

    def _settle(self, driver: int, policy: Policy) -> int:
        return negotiate(
            driver=driver,
            device=self._offer,
            tap=self._tap_offer,
            vmm=self._served,
            policy=policy,
        ).features

    @property
    def queue_sizes(self) -> list[int]:
        """The greatest size of each virtqueue; the control queue is the last one."""
        sizes = [self._config.queue_size] * len(self._kicks) + [CONTROL_SIZE]
        sizes[self._control_at] = CONTROL_SIZE
        return sizes

    @property
    def kicks(self) -> list[EventFd | None]:
        """The eventfds that vhost waits for; the control queue has none."""
        kicks: list[EventFd | None] = [*self._kicks, None]
        kicks[self._control_at] = None
        return kicks

    @property
    def running(self) -> bool:
        """Whether vhost has the rings."""
        return self._session is not None

    @property
    def link(self) -> bool:
        """Whether the guest is told that the link is up."""
        return self._link

    def attach(self, transport: Transport) -> None:
        """Know the transport from now on."""
        self._transport = transport

    def read_config(self, offset: int, length: int) -> bytes:
        """Return bytes of struct virtio_net_config, as far as it is served."""
        status = virtio.VIRTIO_NET_S_LINK_UP * self._link
        status |= virtio.VIRTIO_NET_S_ANNOUNCE * self._announcing
        config = _CONFIG.pack(self._mac, status, len(self._vhost), self._config.mtu or 0)
        return config[offset : offset + length].ljust(length, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        """Change the MAC address, which a legacy driver may do here (virtio 1.2, 5.1.4.2)."""
        if offset + len(data) <= MAC_SIZE:
            self._mac = self._mac[:offset] + data + self._mac[offset + len(data) :]

    def accept(self, features: int) -> bool:
        """Return whether `features` are on offer and need nothing that is not among them."""
        if features & ~self.features or self._settle(features, Policy()) != features:
            return False
        self._place_control(features)
        return True

    def _place_control(self, features: int) -> None:
        many = features >> virtio.VIRTIO_NET_F_MQ & 1
        self._control_at = 2 * (len(self._vhost) if many else 1)

    def start(self, features: int, rings: Sequence[Ring]) -> None:
        """Hand the rings to vhost. Raises InvalidArgument, NegotiationError and KernelError."""
        self._place_control(features)
        pairs = pairs_set_up(rings[: self._control_at])
        session = Session(
            self._session_config(features, pairs),
            memory=self._space,
            **self._handed(pairs),
            rings=[placed(rings, n) for n in range(2 * pairs)],
        )
        self._run(session)
        self._set_control(features, rings, 0)

    def _session_config(self, features: int, pairs: int) -> SessionConfig:
        return SessionConfig(
            tap=self._tap.name,
            device=self._vhost[0].label,
            queues=pairs,
            enabled=1,
            link=self._link,
            queue_size=self._config.queue_size,
            policy=Policy(required=features),
            driver=features,
            vmm=self._served,
        )

    def _handed(self, pairs: int) -> Handed:
        events = zip(self._kicks, self.calls, self.errors, strict=False)
        return handed(self._tap, self._vhost[:pairs], list(events))

    def _run(self, session: Session) -> None:
        try:
            session.prepare()
            session.start()
        except BaseException:
            session.close()
            raise
        self._session = session
        session.kick()  # what was made available before is not rung for again

    def _set_control(self, features: int, rings: Sequence[Ring], base: int) -> None:
        placement = rings[self._control_at]
        if placement is not None and features >> virtio.VIRTIO_NET_F_CTRL_VQ & 1:
            self._control = ControlQueue(self._space, placement, features, base)

    def notify(self, queue: int) -> None:
        """Answer the next command on the control queue.

        The one behind it waits for its turn: each may take a while.
        """
        if queue != self._control_at or self._control is None:
            return
        self._drained_by = time.monotonic() + _DRAIN
        try:
            call = self._control.take(self._command)
        except InvalidArgument as error:
            log.warning("%s: control queue: %s", self._tap.name, error)
            self._control = None
            if self._transport is not None:
                self._transport.needs_reset()
            return
        if call:
            self.calls[queue].signal()
        if call is not None:
            self._notify_later()

    def _notify_later(self) -> None:
        if self._transport is not None:
            self._transport.notify_later(self._control_at)

    def _command(self, command: bytes) -> bytes:
        try:
            return answer(self, command)
        except VhostctlError as error:
            log.warning("%s: command %s: %s", self._tap.name, command[:2].hex(), error)
            return bytes([virtio.VIRTIO_NET_ERR])

    def set_pairs(self, pairs: int) -> bool:
        """Have the first `pairs` pairs take part; False if there are not so many. KernelError."""
        session = self._session
        if session is None or not 1 <= pairs <= session.config.queues:
            return False
        before, self._wanted_pairs = self._wanted_pairs, pairs
        try:
            self._enable_pairs()
        except BaseException:
            self._wanted_pairs = before  # as the driver will think
            with contextlib.suppress(KernelError):
                self._enable_pairs()
            raise
        return True

    def _enable_pairs(self) -> None:
        """Have as many pairs take part as the driver wants; while the link is down none does."""
        session = self._session
        if session is None or not session.link:
            return
        for pair, enabled in enumerate(session.enabled):
            if pair < self._wanted_pairs and not enabled:
                session.enable_pair(pair)
        for pair, enabled in enumerate(session.enabled):
            if pair >= self._wanted_pairs and enabled:
                session.disable_pair(pair, max(0.0, self._drained_by - time.monotonic()))

    def set_mac(self, mac: bytes) -> None:
        """Have another MAC address, of 6 bytes."""
        self._mac = mac

    def announced(self) -> None:
        """Know that the driver has told the network where it is."""
        self._announcing = False

    def set_link(self, up: bool) -> None:
        """Take the link down or up; the driver is told. Raises KernelError."""
        if up == self._link:
            return
        if self._session is not None:
            self._session.set_link(up)
        self._link = up
        self._changed()
        if up:
            self._drained_by = time.monotonic() + _DRAIN
            self._enable_pairs()

    def announce(self) -> None:
        """Ask the driver to tell the network where it is now (VIRTIO_NET_S_ANNOUNCE).

        Nothing if there is none, or one that did not say that it can.
        """
        session = self._session
        if session is not None and session.features >> virtio.VIRTIO_NET_F_GUEST_ANNOUNCE & 1:
            self._announcing = True
            self._changed()

    def _changed(self) -> None:
        if self._transport is not None:
            self._transport.config_changed()

    def reset(self) -> None:
        """Take the rings away from vhost; link and MAC address stay."""
        session, self._session = self._session, None
        self._control = None
        self._control_at = len(self._kicks)
        self._wanted_pairs = 1
        self._announcing = False
        if session is not None:
            running = session.state is State.RUNNING  # else somebody goes on with the tap
            session.close()
            if running:
                # What is queued from now on is for a driver that may take none.
                with contextlib.suppress(KernelError):  # the tap was deleted
                    self._tap.queues[0].set_offload(0)
        for event in (*self._kicks, *self.calls):
            event.drain()

    def save(self) -> NetState:
        """Stop vhost and return what `restore` needs; the tap stays as it is for whoever goes on.

        That may be this device, by `go_on()`. Raises KernelError.
        """
        session = self._session.suspend() if self._session is not None else None
        return NetState(
            mac=self._mac,
            link=self._link,
            announcing=self._announcing,
            wanted_pairs=self._wanted_pairs,
            tap_offer=self._tap_offer,
            session=session,
            control=self._control.base if self._control is not None else None,
            features=self.features,
            pairs=len(self._vhost),
            queue_size=self._config.queue_size,
            mtu=self._config.mtu,
        )

    def go_on(self) -> None:
        """Have vhost work on the rings again after `save()`. Raises KernelError.

        If they could not be stopped the device needs a reset, and the driver is told.
        """
        if self._session is None:
            return
        if self._session.state is State.STOPPED:
            self._session.start()
            self._session.kick()
            self._notify_later()
        elif self._session.state is State.FAILED and self._transport is not None:
            self._transport.needs_reset()

    def restore(self, state: NetState, rings: Sequence[Ring]) -> None:
        """Go on where `save` stopped; `rings` as the driver placed them.

        Raises InvalidArgument, NegotiationError (a feature that was on offer is not) and
        KernelError.
        """
        if missing := state.features & ~self.features:
            raise NegotiationError(
                f"{self._tap.name}: the card had {', '.join(virtio.feature_names(missing))}",
                hint="resume it on a device and a tap that have that",
            )
        self._mac = state.mac
        self._link, self._announcing = state.link, state.announcing
        self._wanted_pairs = state.wanted_pairs
        self.features = state.features
        if state.session is None:
            return
        state.session.check()
        features = state.session.feature_bits
        self._place_control(features)
        session = Session.resume(
            state.session,
            self._vhost[0].label,
            memory=self._space,
            **self._handed(len(state.session.rings) // 2),
        )
        self._run(session)
        if state.control is not None:
            self._set_control(features, rings, state.control)
            self._notify_later()

    def close(self) -> None:
        """Take the rings away from vhost and close what is ours; a second call does nothing."""
        if not self.config_call.closed:
            with self._events:
                self.reset()
