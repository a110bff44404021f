"""The broker: what a caller without privileges gets, and is refused."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.support.broker import GROUP, OTHER, USER, Held, World, as_user
from tests.system.conftest import until
from vhostctl.abi import tun
from vhostctl.broker.policy import Policy, Terms
from vhostctl.broker.protocol import Refused
from vhostctl.broker.server import Broker, listener
from vhostctl.broker.taps import LinkTable, check_alone, claim
from vhostctl.cli.exitcodes import ExitCode
from vhostctl.errors import InvalidArgument, KernelError
from vhostctl.host.ioctl import call
from vhostctl.host.netns import NetNamespace
from vhostctl.host.tap import Tap, TapQueue
from vhostctl.host.vhost import VhostNet


def add_bridges() -> None:
    from pyroute2 import IPRoute

    with IPRoute() as route:
        for name in ("br0", "br1"):
            route.link("add", ifname=name, kind="bridge")


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that every user may enter; pytest's are for their owner."""
    with TemporaryDirectory(prefix="vhostctl-broker-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def world(
    namespace: NetNamespace,
    nothing_left: None,  # noqa: ARG001
    device: str,
    directory: Path,
    caplog: pytest.LogCaptureFixture,
) -> Iterator[World]:
    caplog.set_level(logging.INFO)
    namespace.run(add_bridges)
    first = Terms(
        users=(USER, OTHER),
        groups=(GROUP,),
        taps=("vm-*", "lan?"),
        bridges=("br0",),
        devices=(device,),
        max_queues=2,
        per_user=2,
    )
    second = Terms(users=(USER,), taps=("kthread-*",), devices=(device,), fork_from_owner=False)
    path = directory / "broker.sock"
    with listener(path) as sock, Broker(sock, Policy.of([first, second])) as broker:
        yield World(namespace, broker, path, device)


def test_a_caller_gets_a_tap_and_devices_without_an_owner(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    with Held(*world.ask("vm-1", queues=2, bridge="br0")) as got:
        assert (got.tap.name, got.tap.created) == ("vm-1", True)
        assert len(got.tap.queues) == len(got.devices) == 2
        for queue in got.tap.queues:
            assert queue.flags() & tun.IFF_VNET_HDR
            assert not os.get_inheritable(queue.fileno())
        for device in got.devices:
            device.set_owner()
        state = world.state("vm-1")
        assert (state.up, state.multi_queue) == (True, True)
        assert state.master == world.state("br0").index
        info = world.info("vm-1")
        assert (info.alias, info.owner) == (claim(USER), 0)
        assert f"uid {USER}, pid {os.getpid()}: tap vm-1 (made), on bridge br0" in caplog.text
    assert not world.exists("vm-1")


def test_a_supplementary_group_is_enough(world: World) -> None:
    with pytest.raises(Refused, match="no rule names uid 60007"):
        world.ask("vm-1", uid=60007)
    with Held(*world.ask("vm-1", uid=60007, groups=(4, GROUP))) as got:
        assert got.tap.created


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        ({"tap": "eth7"}, "names tap eth7; have the broker's policy changed"),
        ({"tap": "br0"}, "names tap br0"),
        ({"tap": "vm-1", "bridge": "br1"}, "allow[0]: bridges has br0, not br1"),
        ({"tap": "vm-1", "queues": 3}, "allow[0]: max_queues is 2, not 3"),
        ({"tap": "vm-1", "uid": 60003}, "no rule names uid 60003"),
        ({"tap": "vm-1", "uid": 0}, "no rule names root"),
        ({"tap": "vm-1", "device": "/dev/kvm"}, "not /dev/kvm; have"),
    ],
)
def test_what_the_policy_does_not_name_is_refused_and_logged(
    world: World, caplog: pytest.LogCaptureFixture, wanted: dict[str, object], text: str
) -> None:
    with pytest.raises(Refused) as caught:
        world.ask(**wanted)  # type: ignore[arg-type]
    assert text in str(caught.value)
    (line,) = caplog.messages
    assert line.startswith("refused to ")
    assert f"uid {wanted.get('uid', USER)}" in line
    assert f"pid {os.getpid()}" in line
    assert text in line
    assert not world.exists("vm-1")


def test_each_user_has_so_many_taps(world: World) -> None:
    with Held(*world.ask("vm-1")), Held(*world.ask("vm-2")):
        with pytest.raises(Refused, match="per_user is 2, and 2 are there"):
            world.ask("vm-3")
        with Held(*world.ask("vm-3", uid=OTHER)):
            pass
    with Held(*world.ask("vm-3")):
        pass


def test_a_tap_that_its_holder_keeps_still_counts_and_stays_theirs(world: World) -> None:
    with Held(*world.ask("vm-1")) as got:
        got.tap.queues[0].set_persist(True)
        call(got.tap.queues[0], tun.TUNSETOWNER, OTHER)  # a holder may: it must mean nothing
    with Held(*world.ask("vm-2")), pytest.raises(Refused, match="per_user"):
        world.ask("vm-3")
    with pytest.raises(Refused, match="tap vm-1 is another user's"):
        world.ask("vm-1", uid=OTHER)
    with Held(*world.ask("vm-1")) as got:
        assert not got.tap.created
        got.tap.queues[0].set_persist(False)


def test_the_broker_chooses_a_free_name(world: World) -> None:
    with Held(*world.ask()) as first, Held(*world.ask()) as second:
        assert (first.tap.name, second.tap.name) == ("vm-0", "vm-1")


@pytest.mark.parametrize("queues", [1, 2])
def test_a_tap_in_use_is_refused(world: World, queues: int) -> None:
    with Held(*world.ask("vm-1", queues=2)):
        for uid, text in ((USER, "somebody has the tap open"), (OTHER, "another user's")):
            with pytest.raises((KernelError, Refused), match=text):
                world.ask("vm-1", queues=queues, uid=uid)
    with Held(*world.ask("vm-1")), pytest.raises(OSError, match="somebody has the tap open"):
        world.ask("vm-1")


def test_nobody_else_attaches_to_a_tap_that_was_made(world: World) -> None:
    def attach() -> None:
        queue.attach("vm-1", tun.IFF_TAP | tun.IFF_NO_PI | tun.IFF_VNET_HDR | tun.IFF_MULTI_QUEUE)

    with Held(*world.ask("vm-1", queues=2)):
        for uid in (USER, OTHER):
            with (
                world.namespace.run(lambda: TapQueue("by hand")) as queue,
                pytest.raises(PermissionError),
            ):
                as_user(attach, uid)


def test_a_tap_of_the_administrators_is_brought_up_and_stays(world: World) -> None:
    world.persistent("vm-1")
    with Held(*world.ask("vm-1", bridge="br0")) as got:
        assert not got.tap.created
        assert world.state("vm-1").up
    assert world.state("vm-1").master == world.state("br0").index
    assert world.info("vm-1").alias == ""
    with Held(*world.ask("vm-1", uid=OTHER)) as got:  # on the bridge that it is on
        assert not got.tap.created


def test_an_existing_tap_gives_no_more_than_a_new_one(world: World) -> None:
    world.persistent("vm-1", master=world.state("br1").index)
    with pytest.raises(Refused, match="bridges has br0, not br1"):
        world.ask("vm-1")
    world.persistent("vm-2", master=world.state("br0").index)
    with pytest.raises(InvalidArgument, match="single queue, 2 were asked"):
        world.ask("vm-2", queues=2)
    world.persistent("vm-3")
    with world.namespace.run(lambda: Tap.open("vm-3")) as tap:
        call(tap.queues[0], tun.TUNSETOWNER, OTHER)
    with pytest.raises(Refused, match="another user's"):
        world.ask("vm-3")
    with Held(*world.ask("vm-3", uid=OTHER)):
        pass
    assert not world.state("vm-1").up


def test_what_fails_half_way_leaves_nothing(world: World) -> None:
    world.persistent("vm-2")
    world.namespace.run(lambda: delete("br0"))
    for name in ("vm-1", "vm-2"):
        with pytest.raises(KernelError, match="br0"):
            world.ask(name, bridge="br0")
    assert not world.exists("vm-1")
    assert not world.state("vm-2").up


def delete(name: str) -> None:
    from pyroute2 import IPRoute

    with IPRoute() as route:
        route.link("del", ifname=name)


def test_a_caller_that_leaves_before_the_answer_keeps_nothing(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    data = b'{"tap": "vm-1", "device": "%s"}' % world.device.encode()

    def leave() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(str(world.path))
            sock.send(data)

    as_user(leave)
    with world.serving():
        until(lambda: bool(caplog.messages), "the broker has looked at it")
        until(lambda: not world.broker._callers, "the connection is closed")
    assert not world.exists("vm-1")


def test_answers_that_are_not_fetched_hold_taps_only_while_the_socket_is_open(
    world: World,
) -> None:
    data = b'{"tap": "vm-1", "device": "%s"}' % world.device.encode()

    def ask() -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(str(world.path))
        sock.send(data)
        return sock

    with as_user(ask), world.serving():
        until(lambda: world.exists("vm-1"), "the tap is made")
    until(lambda: not world.exists("vm-1"), "the tap is gone")


def test_the_policy_may_decide_on_the_kind_of_worker(world: World) -> None:
    try:
        with VhostNet.open(world.device) as device:
            device.get_fork_from_owner()
    except KernelError:
        with pytest.raises(KernelError, match="VHOST_SET_FORK_FROM_OWNER"):
            world.ask("kthread-1")
        assert not world.exists("kthread-1")
        return
    with Held(*world.ask("kthread-1")) as got:
        assert got.devices[0].get_fork_from_owner() is False
        got.devices[0].set_owner()


# It imports everything first: the interpreter may lie where only root can read.
RUN_AS_USER = f"""
import os, sys
import vhostctl.cli.run, vhostctl.broker.client
from vhostctl.cli.main import main
os.setgroups([])
os.setgid({USER})
os.setuid({USER})
main()
"""


def test_the_commands(namespace: NetNamespace, device: str, directory: Path) -> None:
    policy, path = directory / "broker.toml", directory / "broker.sock"
    policy.write_text(f"[[allow]]\nusers = [{USER}]\ntaps = ['vm-*']\ndevices = ['{device}']\n")
    vhostctl = [sys.executable, "-m", "vhostctl"]
    command = [*vhostctl, "broker", "--policy", str(policy), "--socket", str(path)]
    broker = namespace.run(lambda: subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    try:
        assert broker.stderr is not None
        assert f"listening on {path}, 1 rules" in broker.stderr.readline()
        script = "id -u; grep CapEff /proc/self/status; readlink /proc/self/fd/{tapfds}"
        client = [sys.executable, "-c", RUN_AS_USER, "run", "--broker", str(path)]
        for tap, status in ((["--tap", "vm-1"], ExitCode.OK), (["--tap", "x"], ExitCode.MISSING)):
            run = subprocess.run(
                [*client, "--device", device, *tap, "--", "sh", "-c", script],
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            assert run.returncode == status, run.stderr
            if status:
                assert "no rule for uid 60001 names tap x" in run.stderr
            else:
                assert run.stdout.split() == [
                    str(USER),
                    "CapEff:",
                    "0000000000000000",
                    "/dev/net/tun",
                ]
        broker.send_signal(signal.SIGTERM)
        _, log = broker.communicate(timeout=60)
    finally:
        broker.kill()
        broker.communicate(timeout=60)
    assert broker.returncode == ExitCode.OK, log
    assert [line.split()[0] for line in log.splitlines()] == ["granted", "refused"]
    assert not path.exists()


def test_a_queue_that_somebody_slipped_in_is_noticed(namespace: NetNamespace) -> None:
    flags = tun.IFF_TAP | tun.IFF_NO_PI | tun.IFF_VNET_HDR | tun.IFF_MULTI_QUEUE

    def look(tap: Tap) -> None:
        with LinkTable() as links:
            check_alone(links, tap)

    with (
        namespace.run(lambda: Tap.open("vm-1", 2)) as tap,
        namespace.run(lambda: TapQueue("stranger's")) as other,
    ):
        namespace.run(lambda: look(tap))
        namespace.run(lambda: other.attach("vm-1", flags))
        with pytest.raises(BlockingIOError, match="somebody else attached"):
            namespace.run(lambda: look(tap))
