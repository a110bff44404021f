"""The doctor's parts: access control, kernel versions, repairs, the command, its page."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.support.doctor_machine import Machine, healthy
from vhostctl.cli import doctor as cli
from vhostctl.cli.exitcodes import ExitCode
from vhostctl.doctor import kernels
from vhostctl.doctor.access import Entry, Node, Tag, may_open, parse_acl
from vhostctl.doctor.examine import CHECKS, FAULTS, examine, repair
from vhostctl.doctor.findings import Severity
from vhostctl.doctor.system import System
from vhostctl.errors import EnvironmentMissing

PAGE = Path(__file__).parents[2] / "docs/doctor.md"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return healthy(tmp_path)


def without_module(machine: Machine) -> None:
    machine.remove("/sys/module/vhost_net")
    machine.remove("/sys/class/misc/vhost-net")
    machine.nodes.pop("/dev/vhost-net")


def attribute(*entries: tuple[int, int, int]) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *one) for one in entries)


def test_an_access_control_list_is_read() -> None:
    value = attribute((1, 6, 0xFFFFFFFF), (2, 6, 1000), (4, 0, 0xFFFFFFFF), (16, 4, 0xFFFFFFFF))
    entries = parse_acl(value)
    assert [str(one) for one in entries] == [
        "user_obj::rw",
        "user:1000:rw",
        "group_obj::--",
        "mask::r-",
    ]
    assert parse_acl(b"") == ()
    assert parse_acl(struct.pack("<I", 3)) == ()


def acl(*entries: Entry) -> Node:
    return Node(0o660, 0, 108, (10, 238), entries)


@pytest.mark.parametrize(
    ("node", "uid", "groups", "expected"),
    [
        (Node(0o660, 0, 108, None), 1000, {108}, True),
        (Node(0o660, 0, 108, None), 1000, {1}, False),
        (Node(0o066, 1000, 108, None), 1000, {108}, False),  # the owner's bits, and no others
        (Node(0o606, 0, 108, None), 1000, {108}, False),
        (Node(0o606, 0, 108, None), 1000, {1}, True),
        (Node(0o640, 0, 108, None), 1000, {108}, False),  # reading alone is not enough
        (acl(Entry(Tag.USER, 6, 1000), Entry(Tag.MASK, 6)), 1000, set(), True),
        (acl(Entry(Tag.USER, 6, 1000), Entry(Tag.MASK, 4)), 1000, set(), False),
        (acl(Entry(Tag.GROUP, 6, 7), Entry(Tag.GROUP_OBJ, 0)), 1000, {7, 108}, True),
        (acl(Entry(Tag.GROUP, 4, 7), Entry(Tag.OTHER, 6)), 1000, {7}, False),
        (acl(Entry(Tag.GROUP, 4, 7), Entry(Tag.OTHER, 6)), 1000, {8}, True),
    ],
)
def test_who_may_open(node: Node, uid: int, groups: set[int], expected: bool) -> None:
    assert may_open(node, uid, groups) is expected


@pytest.mark.parametrize(
    ("release", "files", "expected"),
    [
        ("6.1.0-56-amd64", {"/proc/version": "Linux #1 SMP Debian 6.1.192-2 (2026)"}, (6, 1, 192)),
        ("6.12.117+deb12-amd64", {"/proc/version": "#1 Debian 6.12.117-1~deb12"}, (6, 12, 117)),
        ("6.8.0-31-generic", {"/proc/version_signature": "Ubuntu 6.8.0-31.31 6.8.4"}, (6, 8, 4)),
        ("6.8.0-31-generic", {}, None),
        ("5.14.0-427.13.1.el9_4.x86_64", {}, None),
        ("6.12.100-55.el10.x86_64", {}, None),
        ("6.9.8", {}, (6, 9, 8)),
        ("6.9.8-arch1-1", {}, (6, 9, 8)),
        ("6.9.0", {}, (6, 9, 0)),
        ("6.9", {}, (6, 9, 0)),
        ("7.0-rc1", {}, None),
    ],
)
def test_the_stable_version(
    tmp_path: Path, release: str, files: dict[str, str], expected: tuple[int, int, int] | None
) -> None:
    machine = Machine(tmp_path)
    for name, text in ({"/proc/sys/kernel/osrelease": release} | files).items():
        machine.write(name, text)
    assert kernels.stable_version(machine.look()) == expected


def test_ranges_stay_within_a_series_and_say_where_they_end() -> None:
    for bad in kernels.KNOWN_BAD:
        for span in bad.ranges:
            assert (span.fixed == "") != (span.last == "")
            end = span.fixed or span.last
            assert end.split(".")[:2] == span.first.split(".")[:2]


@pytest.mark.parametrize("release", ["6.12.117", "6.1.192"])
def test_a_kernel_with_the_fixes_has_no_warning(machine: Machine, release: str) -> None:
    machine.write("/proc/version", f"Linux (Debian {release}-1)")
    severities = {one.fault.severity for one in examine(machine.look()).findings}
    assert severities <= {Severity.NOTE}


def test_what_is_safe_is_repaired_once(machine: Machine) -> None:
    without_module(machine)
    system = machine.look()
    report = examine(system)
    assert [one.fault.code for one in report.findings if one.fix] == [
        "VHOST-NODE-MISSING",
        "VHOST-MODULE-NOT-LOADED",
    ]
    ran: list[Sequence[str]] = []
    (done,) = repair(report, system, ran.append)
    assert (done.command, done.failure, ran) == (
        "modprobe vhost_net",
        "",
        [("modprobe", "vhost_net")],
    )


def test_a_repair_that_fails_says_why(machine: Machine) -> None:
    def fail(_command: Sequence[str]) -> None:
        raise EnvironmentMissing("modprobe: ERROR")

    without_module(machine)
    report = examine(machine.look())
    assert repair(report, machine.look(), fail)[0].failure == "modprobe: ERROR"
    machine.edit("/proc/self/status", "000001ffffffffff", "0000000000000000")
    assert "CAP_SYS_MODULE" in repair(report, machine.look(), fail)[0].failure


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("/etc/modprobe.d/x.conf", "blacklist vhost_net"),
        ("/etc/modprobe.d/x.conf", "install vhost_net /bin/true"),
        ("/proc/cmdline", "module_blacklist=vhost"),
    ],
)
def test_what_somebody_forbade_is_not_repaired(machine: Machine, name: str, text: str) -> None:
    without_module(machine)
    machine.write(name, text)
    report = examine(machine.look())
    assert not [one for one in report.findings if one.fix]


def test_errors_come_first_and_codes_choose(machine: Machine) -> None:
    without_module(machine)
    machine.write("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "0")
    severities = [one.fault.severity for one in examine(machine.look()).findings]
    assert severities == [Severity.ERROR, Severity.WARNING, Severity.NOTE]
    (only,) = examine(machine.look(), ["VHOST-LIMIT-HUGEPAGES"]).findings
    assert only.fault.severity is Severity.NOTE


def test_it_ends_with_what_works(machine: Machine) -> None:
    machine.acts["owning"] = EnvironmentMissing("no")
    works = {one.name: one.works for one in examine(machine.look()).means}
    assert works == {
        "own the device": False,
        "wire a tap to it": False,
        "prove it with traffic": False,
        "the engine, with traffic": True,
        "the engine": True,
        "a real kernel in a VM": True,
    }


def test_this_machine_can_be_looked_at() -> None:
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    report = examine(System())
    assert report.kernel == os.uname().release
    assert "VHOST-ENGINE-BROKEN" not in {one.fault.code for one in report.findings}
    assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def invoke(machine: Machine, monkeypatch: pytest.MonkeyPatch, *words: str) -> Result:
    def look(device: str) -> System:
        machine.device = device
        return machine.look()

    monkeypatch.setattr(cli, "System", look)
    return CliRunner().invoke(cli.doctor, words)


def test_a_healthy_machine_ends_0(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    result = invoke(machine, monkeypatch)
    assert result.exit_code == ExitCode.OK
    assert "Nothing is wrong." in result.stdout
    assert re.search(r"yes +own the device +vhostctl probe$", result.stdout, re.MULTILINE)


def test_a_warning_ends_0(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.write("/proc/sys/vm/max_map_count", "10")
    result = invoke(machine, monkeypatch)
    assert result.exit_code == ExitCode.OK
    assert "warning: VHOST-LIMIT-MAPS: " in result.stdout
    assert "  remedy  sysctl -w vm.max_map_count=65530\n" in result.stdout


def test_fix_repairs_looks_again_and_says_so(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = dict(machine.nodes)
    without_module(machine)

    def load(_command: Sequence[str]) -> None:
        machine.write("/sys/module/vhost_net/initstate", "live")
        machine.write("/sys/class/misc/vhost-net/dev", "10:238")
        machine.nodes.update(nodes)

    monkeypatch.setattr(cli, "_run", load)
    result = invoke(machine, monkeypatch, "--fix", "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == ExitCode.OK
    assert document["schema"] == "vhostctl.doctor/1"
    assert document["findings"] == []
    assert document["repairs"] == [{"command": "modprobe vhost_net", "failure": ""}]
    assert "Nothing that --fix may change." in invoke(machine, monkeypatch, "--fix").stdout


def test_json_has_all_of_a_finding(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    without_module(machine)
    result = invoke(machine, monkeypatch, "--json", "VHOST-NODE-MISSING")
    (finding,) = json.loads(result.stdout)["findings"]
    assert finding == {
        "code": "VHOST-NODE-MISSING",
        "severity": "error",
        "meaning": "/dev/vhost-net is not there.",
        "evidence": "/dev/vhost-net: No such file or directory",
        "remedy": "modprobe vhost_net",
        "fixable": True,
    }


@pytest.mark.parametrize(
    ("words", "match"), [(["VHOST-NO-SUCH"], "VHOST-NO-SUCH"), (["--device", "engine"], "engine")]
)
def test_wrong_usage(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, words: list[str], match: str
) -> None:
    assert match in str(invoke(machine, monkeypatch, *words).exception)


def test_the_page_lists_every_code() -> None:
    rows = [f"| `{f.code}` | {f.severity} | {f.meaning} | {f.remedy} |" for f in FAULTS.values()]
    page = PAGE.read_text(encoding="utf-8").splitlines()
    assert [line for line in page if line.startswith("| `VHOST-")] == rows
    assert len(CHECKS) == len(set(CHECKS))
