"""The conformance suite's own machinery, without a device."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as Xml

import pytest
from click.testing import CliRunner, Result

from vhostctl.abi import vhost
from vhostctl.abi.ioctl import Request
from vhostctl.cli.exitcodes import ExitCode
from vhostctl.cli.main import main
from vhostctl.conformance import case as registry
from vhostctl.conformance import child, report, run, wanted
from vhostctl.conformance.case import Case, all_cases, case, select
from vhostctl.conformance.flags import Flags, probe
from vhostctl.conformance.report import Difference, Report
from vhostctl.conformance.target import Target
from vhostctl.errors import ClosedError, InvalidArgument
from vhostctl.host import netns
from vhostctl.host.vhost import VhostNet

FLAGS = Flags(*[False] * len(Flags.__slots__))


class Channel:
    """Answers every request with `errno` of its name, or 0."""

    label = "fake"

    def __init__(self, refusals: dict[str, int] | None = None) -> None:
        self.refusals = refusals or {}
        self.asked: list[str] = []
        self.open = True

    def ioctl(self, request: Request, argument: object) -> int:
        if not self.open:
            raise ClosedError("fake is closed")
        self.asked.append(request.name)
        if request.name in self.refusals:
            raise OSError(self.refusals[request.name], "refused")
        if request is vhost.VHOST_GET_FEATURES:
            assert isinstance(argument, ctypes.c_uint64)
            argument.value = 1 << 40
        return 0

    def read(self, size: int) -> bytes:
        message = vhost.vhost_msg_v2(type=vhost.VHOST_IOTLB_MSG_V2)
        message.iotlb.iova = 77
        return bytes(message)[:size]

    def write(self, data: bytes) -> int:
        if "write" in self.refusals:
            raise OSError(self.refusals["write"], "refused")
        self.asked.append(f"write {len(data)}")
        return len(data)

    def fileno(self) -> int:
        raise OSError

    def settle(self, _queue: int) -> int:
        raise OSError

    def detach(self) -> int:
        raise OSError

    def close(self) -> None:
        self.open = False


def opener() -> VhostNet:
    return VhostNet(Channel())


SUBJECT = run.Subject(opener, run.MIRROR, FLAGS)


@pytest.fixture(autouse=True)
def _no_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netns, "unshare", lambda: None)  # it takes root, and is not used here


def rule(function: Callable[[Target], None], *needs: str, seconds: float = 20) -> Case:
    return Case("group", "A rule.", function, needs, seconds)


def outcome(function: Callable[[Target], None], *needs: str, seconds: float = 20) -> report.Result:
    cases = [rule(function, *needs, seconds=seconds)]
    (result,) = run.run(cases, SUBJECT, [])
    return result


def test_a_case_that_sees_what_it_wants_passes_and_tells_what_it_saw() -> None:
    result = outcome(lambda target: target.check("answer", (1, "x"), [1, "x"]))
    assert (result.status, result.observed, result.mismatches) == ("pass", {"answer": [1, "x"]}, [])


def test_a_mismatch_fails_and_the_rest_is_observed_all_the_same() -> None:
    def body(target: Target) -> None:
        target.check("first", "EPERM", "")
        target.check("second", 2, 2)

    result = outcome(body)
    assert result.status == "fail"
    assert result.observed == {"first": "EPERM", "second": 2}
    assert result.details == ['first: "EPERM", not ""']


def test_a_case_without_the_flag_that_it_needs_is_not_run() -> None:
    result = outcome(lambda _: os._exit(9), "in_order")
    assert (result.status, result.problem) == ("n/a", "not in_order")


def crash(_: Target) -> None:
    signal.raise_signal(signal.SIGKILL)


def fail(_: Target) -> None:
    raise ValueError("what?")


def leave(_: Target) -> None:
    os._exit(3)


def twice(target: Target) -> None:
    target.check("x", 1, 1)
    target.check("x", 1, 1)


def wedge(_: Target) -> None:
    while True:
        time.sleep(1)


@pytest.mark.parametrize(
    ("body", "seconds", "problem"),
    [
        (crash, 20, "ended by SIGKILL"),
        (fail, 20, "ValueError: what?"),
        (leave, 20, "ended with status 3 and no answer"),
        (twice, 20, "InvalidArgument: two observations are called 'x'"),
        (wedge, 0.2, "no end within 0.2 s"),
    ],
)
def test_a_case_that_goes_wrong_costs_itself(
    body: Callable[[Target], None], seconds: float, problem: str
) -> None:
    result = outcome(body, seconds=seconds)
    assert (result.status, result.problem) == ("error", problem)


def test_an_answer_is_taken_from_a_case_that_left_a_process_behind() -> None:
    def body(target: Target) -> None:
        if os.fork() == 0:
            signal.alarm(5)
            signal.pause()
        target.check("x", 1, 1)

    assert outcome(body).status == "pass"


def test_a_child_that_does_not_end_after_its_answer_is_no_pass() -> None:
    ran = os.getpid()

    def body() -> object:
        os._exit = wedge  # type: ignore[assignment]
        return os.getpid()

    with pytest.raises(child.ChildError, match="no end within"):
        child.call(body, 0.5)
    assert os.getpid() == ran


def test_the_errno_is_told_by_name() -> None:
    def refuse(number: int) -> Callable[[], None]:
        def call() -> None:
            raise OSError(number, "")

        return call

    with Target(opener, FLAGS) as target:
        assert [target.refused(refuse(n)) for n in (1, 11, 95)] == ["EPERM", "EAGAIN", "EOPNOTSUPP"]
        assert target.refused(lambda: None) == ""


def test_a_wait_that_runs_out_is_a_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vhostctl.conformance.target.PATIENCE", 0.01)
    with Target(opener, FLAGS) as target:
        assert target.wait(lambda: True, "comes")
        assert not target.wait(lambda: False, "never comes")
        assert target.mismatches == [Difference("never comes", got=False, want=True)]
        assert target.observed == {"never comes": False}


def test_devices_are_closed_before_what_was_kept() -> None:
    order: list[str] = []

    class Noting(Channel):
        def close(self) -> None:
            order.append("device")

    class Kept:
        def close(self) -> None:
            order.append("memory")

    with Target(lambda: VhostNet(Noting()), FLAGS) as target:
        target.open()
        target.keep(Kept())
        target.open()
    assert order == ["device", "device", "memory"]


def test_settle_asks_every_open_device_and_bears_with_closed_ones() -> None:
    channels: list[Channel] = []

    def make() -> VhostNet:
        channels.append(Channel({"VHOST_SET_LOG_FD": 9}))
        return VhostNet(channels[-1])

    with Target(make, FLAGS) as target:
        target.open().close()
        target.open()
        target.settle()
    assert [channel.asked for channel in channels] == [[], ["VHOST_SET_LOG_FD"]]


def entry(**change: object) -> str:
    fields = {
        "kinds": ["mirror"],
        "case": "group: A rule.",
        "what": "x",
        "value": 2,
        "reason": "it is better",
    } | change
    return "[[difference]]\n" + "\n".join(f"{k} = {json.dumps(v)}" for k, v in fields.items())


def judged(text: str, saw: int, kind: str = run.MIRROR) -> report.Result:
    cases = [rule(lambda target: target.check("x", saw, 1))]
    (result,) = run.run(cases, replace(SUBJECT, kind=kind), wanted.read(text))
    return result


def test_a_difference_that_is_wanted_passes_and_shows_its_reason() -> None:
    result = judged(entry(), saw=2)
    assert (result.status, result.details) == ("pass", ["x: 2, not 1 (wanted: it is better)"])


def test_a_wanted_difference_is_for_its_kinds_and_its_value_only() -> None:
    assert judged(entry(), saw=3).status == "fail"
    assert judged(entry(), saw=2, kind=run.IN_TREE).status == "fail"
    assert judged(entry(what="y"), saw=2).status == "fail"


def test_a_wanted_difference_that_does_not_happen_fails() -> None:
    result = judged(entry(), saw=1)
    assert (result.status, result.problem) == ("fail", "wanted.toml lists what did not happen: x")
    assert judged(entry(), saw=1, kind=run.ENGINE).status == "pass"


def test_a_wanted_difference_of_no_case_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"there is no case 'group: A rule\.'"):
        wanted.check_titles(wanted.read(entry()), ["group: Another."])


@pytest.mark.parametrize("text", ["[[difference", entry(colour=1), "[[difference]]\nwhat = 1"])
def test_a_broken_list_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"wanted\.toml"):
        wanted.read(text)


def test_the_list_of_this_package_is_about_cases_that_exist() -> None:
    wanted.check_titles(wanted.read(), (case.title for case in all_cases()))


def test_every_case_is_one_sentence_of_its_own() -> None:
    cases = all_cases()
    assert len({case.title for case in cases}) == len(cases) >= 150
    for found in cases:
        assert found.name.endswith("."), found.title


def test_a_name_is_taken_once_and_flags_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registry", {})

    def one(_: Target) -> None:
        pass

    def other(_: Target) -> None:
        pass

    case("A rule.")(one)
    with pytest.raises(InvalidArgument, match="exists already"):
        case("A rule.")(other)
    with pytest.raises(InvalidArgument, match="no flag colour"):
        case("Another.", needs=("colour",))(other)


def test_cases_are_chosen_by_a_word_in_group_or_name() -> None:
    cases = [Case("tx", "One goes out.", fail), Case("rx", "ONE comes in.", fail)]
    assert select(cases, "one") == cases
    assert select(cases, "TX:") == cases[:1]
    with pytest.raises(InvalidArgument, match="'nine'"):
        select(cases, "nine")


def test_flags_are_what_the_device_answers() -> None:
    found = probe(
        lambda: VhostNet(Channel({"VHOST_GET_FEATURES_ARRAY": 1, "write": 14})), node=True
    )
    assert found.node
    assert found.ring_reset
    assert not found.in_order
    assert not found.features_array
    assert found.fork_from_owner
    assert found.platform_toggles


def test_messages_are_read_in_their_version() -> None:
    device = opener()
    message = device.read_message()
    assert isinstance(message, vhost.vhost_msg_v2)
    assert message.iotlb.iova == 77
    device.write_message(message)
    assert device.read(8) == bytes(message)[:8]
    with pytest.raises(OSError, match="write on fake"):
        VhostNet(Channel({"write": 14})).write(b"")


def full_report(device: str, saw: int) -> Report:
    cases = [
        rule(lambda target: target.check("x", saw, 1)),
        Case("group", "Another.", leave),
        Case("group", "Not here.", leave, ("node",)),
    ]
    results = list(run.run(cases, SUBJECT, []))
    return Report(device, run.MIRROR, "6.1", {"node": False}, results)


def test_a_report_comes_back_from_its_document(tmp_path: Path) -> None:
    found = full_report("one", 2)
    (tmp_path / "a.json").write_text(json.dumps(found.document()))
    assert report.load(str(tmp_path / "a.json")) == found
    assert found.summary == "3 cases: 0 pass, 1 fail, 1 error, 1 n/a; 0 with wanted differences"
    assert [result.name for result in found.failed] == ["A rule.", "Another."]


def test_junit_has_every_case() -> None:
    suite = Xml.fromstring(full_report("one", 2).junit())  # noqa: S314 -- our own document
    assert [suite.get(name) for name in ("tests", "failures", "errors", "skipped")] == [
        *("3", "1", "1", "1")
    ]
    assert [element.tag for element in suite.iter() if element.get("message")] == [
        *("failure", "error", "skipped")
    ]


def diff(*paths: Path) -> Result:
    return CliRunner().invoke(main, ["conformance", "diff", *map(str, paths)])


def test_diff_prints_what_differs_and_nothing_else(tmp_path: Path) -> None:
    one, same, other, fewer = (tmp_path / name for name in ("1", "2", "3", "4"))
    one.write_text(json.dumps(full_report("one", 1).document()))
    same.write_text(json.dumps(full_report("same", 1).document()))
    other.write_text(json.dumps(full_report("other", 2).document()))
    document = full_report("fewer", 1).document()
    del document["results"][1:]
    fewer.write_text(json.dumps(document))
    assert (diff(one, same).exit_code, diff(one, same).stdout) == (ExitCode.OK, "")
    found = list(report.compare(report.load(str(one)), report.load(str(other))))
    title = "group: A rule."
    assert found == [(title, "status", "pass", "fail"), (title, "x", "1", "2")]
    assert diff(one, other).exit_code == ExitCode.DIFFERENT
    assert "A rule." in diff(one, other).stdout
    found = list(report.compare(report.load(str(fewer)), report.load(str(one))))
    assert [(case, one, other) for case, _, one, other in found] == [
        ("group: Another.", "absent", "error"),
        ("group: Not here.", "absent", "n/a"),
    ]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "vhostctl.conformance/1"}'])
def test_diff_of_something_else_is_wrong_usage(tmp_path: Path, text: str) -> None:
    (tmp_path / "x").write_text(text)
    assert diff(tmp_path / "x", tmp_path / "x").exit_code == ExitCode.USAGE


def test_a_device_that_is_not_there_is_missing() -> None:
    result = CliRunner().invoke(main, ["conformance", "--device", "/nowhere"])
    assert result.exit_code == ExitCode.MISSING
