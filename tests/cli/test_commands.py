"""The command line without a device: usage, plans, errors and their exit statuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from vhostctl.cli.exitcodes import ExitCode
from vhostctl.cli.main import _COMMANDS, main
from vhostctl.jobs.guests import GuestIdentity, GuestSpec
from vhostctl.jobs.run import Descriptors, environment, fill_in


def vhostctl(*args: str) -> Result:
    return CliRunner().invoke(main, args)


@pytest.mark.parametrize("command", ["", *_COMMANDS])
def test_each_command_explains_itself(command: str) -> None:
    result = vhostctl(*filter(None, [command]), "--help")
    assert result.exit_code == ExitCode.OK
    assert "Usage:" in result.stdout


def test_an_unknown_command_is_wrong_usage() -> None:
    assert vhostctl("frobnicate").exit_code == ExitCode.USAGE


def test_dry_run_prints_the_whole_plan_and_opens_nothing() -> None:
    before = set(Path("/proc/self/fd").iterdir())
    result = vhostctl("selftest", "--dry-run", "--queues", "2", "--device", "/nowhere")
    assert result.exit_code == ExitCode.OK
    steps = [line.split(maxsplit=1)[1] for line in result.stdout.splitlines()]
    requests = [step.split()[0] for step in steps if step.startswith("VHOST_")]
    ring = [f"VHOST_SET_VRING_{name}" for name in ("NUM", "BASE", "ADDR", "KICK", "CALL", "ERR")]
    assert requests == (
        ["VHOST_SET_OWNER"] * 2
        + ["VHOST_GET_FEATURES"]
        + ["VHOST_SET_FEATURES"] * 2
        + ["VHOST_SET_MEM_TABLE"] * 2
        + ring * 4
        + ["VHOST_NET_SET_BACKEND"] * 4
    )
    assert steps.index("open /nowhere pair 0") > steps.index("map guest memory 2 MiB")
    assert set(Path("/proc/self/fd").iterdir()) == before


def test_dry_run_as_json() -> None:
    document = json.loads(vhostctl("selftest", "--dry-run", "--json").stdout)
    assert document["schema"] == "vhostctl.plan/1"
    assert document["steps"][-1]["name"] == "post receive buffers"


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["selftest", "--queue-size", "100"], ExitCode.USAGE, "power of two"),
        (["selftest", "--queue-size", "65536"], ExitCode.USAGE, "power of two"),
        (["selftest", "--queues", "0"], ExitCode.USAGE, "0 queue pairs"),
        (["selftest", "--queues", "257"], ExitCode.USAGE, "257 queue pairs"),
        (["selftest", "--frames", "0"], ExitCode.USAGE, "0 frames"),
        (["selftest", "--queue-size", "2"], ExitCode.USAGE, "ring of 2 descriptors"),
        (["probe", "--device", "/nowhere"], ExitCode.MISSING, "/nowhere: No such file"),
        (["bench", "--frame", "20"], ExitCode.USAGE, "frame of 20 bytes"),
        (["bench", "--seconds", "0"], ExitCode.USAGE, "seconds"),
        (["up", "x", "--tap", "a b"], ExitCode.USAGE, "'a b' is no link name"),
        (["up", "x", "--tap", "t", "--addr", "300.1.1.1"], ExitCode.USAGE, "300.1.1.1"),
        (["up", "x", "--tap", "t", "--mtu", "9"], ExitCode.USAGE, "MTU 9"),
        (["up", "x", "--tap", "t", "--mac", "01:00:00:00:00:00"], ExitCode.USAGE, "MAC address"),
        (["up", "x", "--tap", "t", "--guest", "pcap:"], ExitCode.USAGE, "guest 'pcap:'"),
        (["run", "--tap", "t", "--user", "nobody-here", "x"], ExitCode.USAGE, "no such user"),
        (["run", "--tap", "t"], ExitCode.USAGE, "COMMAND"),
        (["run", "--tap", "t", "--quues", "2", "--", "true"], ExitCode.USAGE, "--quues"),
        (["up", "x", "--tap", "tap%d"], ExitCode.USAGE, "'tap%d' is no link name"),
        (["up", "x", "--tap", "t", "--addr", "192.0.2.254/24"], ExitCode.USAGE, "broadcast"),
        (["up", "x", "--tap", "t", "--addr", "192.0.2.1/32"], ExitCode.USAGE, "no address after"),
    ],
)
def test_bad_input_gets_one_line_and_its_status(args: list[str], code: ExitCode, text: str) -> None:
    result = vhostctl(*args)
    assert (result.exit_code, text in result.stderr) == (code, True), result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_run_fills_in_the_descriptors() -> None:
    descriptors = Descriptors(tap=(3, 5), vhost=(4, 6))
    argv = ["qemu", "-netdev", "tap,id=n,fds={tapfds},vhost=on,vhostfds={vhostfds}", "{other}"]
    assert fill_in(argv, descriptors)[2:] == [
        "tap,id=n,fds=3:5,vhost=on,vhostfds=4:6",
        "{other}",
    ]
    assert environment(descriptors)["TAPFDS"] == "3:5"
    assert environment(descriptors)["VHOSTFDS"] == "4:6"


def test_a_guest_keeps_its_identity() -> None:
    first = GuestIdentity.choose("demo", None, ["192.0.2.1/24", "2001:db8::1/64"])
    assert first == GuestIdentity.choose("demo", None, ["192.0.2.1/24", "2001:db8::1/64"])
    assert (first.ipv4, first.ipv6) == ("192.0.2.2", "2001:db8::2")
    assert first.mac[0] == 2
    assert first.mac != GuestIdentity.choose("other", None, []).mac
    assert GuestSpec.parse("forward:eth0") == GuestSpec("forward", "eth0")


def test_an_interrupt_is_no_traceback() -> None:
    code = (
        "import signal, os, time; from vhostctl.cli import main as m\n"
        "import vhostctl.cli.probe as p\n"
        # The handler runs at the interpreter's leisure: the sleep gives it the time.
        "p.ask = lambda device: (os.kill(os.getpid(), signal.SIGINT), time.sleep(60))\n"
        "m.main(['probe'])\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == ExitCode.INTERRUPTED
    assert "Traceback" not in run.stderr
