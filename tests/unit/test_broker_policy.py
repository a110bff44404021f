"""The broker's policy: who gets what, and what a refusal and a wrong file say."""

from __future__ import annotations

import pwd
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostctl.broker.peer import Peer
from vhostctl.broker.policy import Policy, Terms
from vhostctl.broker.protocol import (
    MAX_QUEUES,
    Granted,
    Refused,
    Request,
    denial,
    parse_answer,
    parse_request,
)
from vhostctl.errors import InvalidArgument, KernelError, VhostctlError, kernel_error
from vhostctl.host.vhost import DEFAULT_PATH

NOBODY = Peer(77, pwd.getpwnam("nobody").pw_uid, frozenset({65534}))
NAMES = st.text("abcvm-01*?", min_size=1, max_size=8)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "broker.toml"
    path.write_text(text)
    return path


def decide(policy: Policy, peer: Peer, request: Request) -> str:
    rule = policy.rule(peer, request.tap)
    rule.check(request)
    return rule.label


def test_a_policy_is_read_with_its_names_resolved(tmp_path: Path) -> None:
    text = """
        [[allow]]
        users = ["nobody", 4711, "4712"]
        groups = ["daemon"]
        taps = ["vm-*", "lan0"]
        bridges = ["br0"]
        max_queues = 4
        per_user = 2
        devices = ["/dev/vhost-net", "/dev/vhost-net-mirror"]
        fork_from_owner = true
    """
    (rule,) = Policy.load(written(tmp_path, text)).rules
    assert rule.uids == {NOBODY.uid, 4711, 4712}
    assert rule.gids == {1}
    assert rule.terms.fork_from_owner is True


def test_without_a_rule_nothing_is_allowed(tmp_path: Path) -> None:
    policy = Policy.load(written(tmp_path, ""))
    with pytest.raises(Refused, match=r"no rule names nobody \(uid \d+\); have the broker's"):
        policy.rule(NOBODY, "vm-0")


@pytest.mark.parametrize(
    ("lines", "where", "what"),
    [
        (['users = ["nobody"]'], 1, "taps"),
        (['taps = ["vm-*"]'], 1, "neither users nor groups"),
        (["users = [1]", "taps = []"], 3, "taps"),
        (["users = [1]", 'taps = ["a/b"]'], 3, "taps"),
        (['users = ["nobody", "noone-here"]', 'taps = ["a"]'], 2, "'noone-here' is not known"),
        (["users = [1]", 'groups = ["nogroup-here"]', 'taps = ["a"]'], 3, "groups"),
        (["users = [1]", 'taps = ["a"]', "max_queues = 127"], 4, "max_queues"),
        (["users = [1]", 'taps = ["a"]', 'max_queues = "2"'], 4, "max_queues"),
        (["users = [1]", 'taps = ["a"]', "per_user = 0"], 4, "per_user"),
        (["users = [1]", 'taps = ["a"]', 'devices = ["engine"]'], 4, "devices"),
        (["users = [1]", 'taps = ["a"]', 'bridge = ["br0"]'], 4, "bridge"),
        (["users = [1]", "taps = ["], 3, ""),
    ],
)
def test_a_wrong_file_is_refused_with_file_line_and_key(
    tmp_path: Path, lines: list[str], where: int, what: str
) -> None:
    path = written(tmp_path, "\n".join(["[[allow]]", *lines]))
    with pytest.raises(InvalidArgument) as caught:
        Policy.load(path)
    assert str(caught.value).startswith(f"{path}:{where}: ")
    assert what in str(caught.value)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="check the path"):
        Policy.load(tmp_path / "missing")


POLICY = Policy.of(
    [
        Terms(users=(NOBODY.uid,), taps=("vm-1",), max_queues=2, bridges=("br0", "br1")),
        Terms(users=(NOBODY.uid,), taps=("vm-*",), max_queues=4),
        Terms(groups=(500,), taps=("lan?",), devices=("/dev/vhost-net-mirror",)),
    ]
)
MEMBER = Peer(78, 4711, frozenset({4711, 500}))


@pytest.mark.parametrize(
    ("peer", "request_", "label"),
    [
        (NOBODY, Request(tap="vm-1", queues=2, bridge="br1"), "allow[0]"),
        (NOBODY, Request(tap="vm-2", queues=4), "allow[1]"),
        (NOBODY, Request(queues=4), "allow[1]"),
        (MEMBER, Request(tap="lan7", device="/dev/vhost-net-mirror"), "allow[2]"),
    ],
)
def test_the_first_rule_for_caller_and_tap_decides(
    peer: Peer, request_: Request, label: str
) -> None:
    assert decide(POLICY, peer, request_) == label


@pytest.mark.parametrize(
    ("peer", "request_", "text"),
    [
        (Peer(1, 0, frozenset({0})), Request(tap="vm-1"), "no rule names root"),
        (NOBODY, Request(tap="eth0"), "no rule for nobody (uid 65534) names tap eth0"),
        (NOBODY, Request(tap="lan1"), "names tap lan1; have the broker's policy"),
        (NOBODY, Request(tap="vm-1", queues=3), "allow[0]: max_queues is 2, not 3; have the"),
        (NOBODY, Request(tap="vm-1", bridge="br2"), "allow[0]: bridges has br0, br1, not br2"),
        (NOBODY, Request(tap="vm-2", bridge="br0"), "allow[1]: bridges has none, not br0"),
        (
            NOBODY,
            Request(tap="vm-2", device="/dev/kvm"),
            "devices has /dev/vhost-net, not",
        ),
        (
            MEMBER,
            Request(tap="lan1"),
            "allow[2]: devices has /dev/vhost-net-mirror, not",
        ),
        (MEMBER, Request(), "no rule for uid 4711 has a pattern to choose a tap by"),
    ],
)
def test_a_refusal_says_what_the_policy_lacks(peer: Peer, request_: Request, text: str) -> None:
    with pytest.raises(Refused) as caught:
        decide(POLICY, peer, request_)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@given(
    st.lists(st.tuples(st.booleans(), NAMES, st.integers(1, 5)), max_size=4),
    st.text("abcvm-01", min_size=1, max_size=8),
    st.integers(1, 6),
)
def test_what_is_allowed_is_what_the_first_match_gives(
    tables: list[tuple[bool, str, int]], tap: str, queues: int
) -> None:
    policy = Policy.of(
        [
            Terms(users=(NOBODY.uid if theirs else 1,), taps=(pattern,), max_queues=most)
            for theirs, pattern, most in tables
        ]
    )
    first = next((t for t in tables if t[0] and fnmatchcase(tap, t[1])), None)
    try:
        decide(policy, NOBODY, Request(tap=tap, queues=queues))
    except Refused:
        assert first is None or queues > first[2]
    else:
        assert first is not None
        assert queues <= first[2]


@given(st.sets(st.integers(0, 30).map("vm-{}".format)), st.integers(1, 10), st.integers(0, 12))
def test_names_and_numbers_of_taps(taken: set[str], most: int, there: int) -> None:
    policy = Policy.of([Terms(users=(NOBODY.uid,), taps=("x?", "vm-*"), per_user=most)])
    rule = policy.rule(NOBODY, None)
    name = rule.free_name(taken)
    assert rule.covers(name)
    assert name not in taken
    assert taken.issuperset(f"vm-{index}" for index in range(int(name.removeprefix("vm-"))))
    if there < most:
        rule.check_count(there)
        return
    with pytest.raises(Refused, match="per_user"):
        rule.check_count(there)


def test_a_pattern_with_no_room_for_a_number_gives_no_name() -> None:
    policy = Policy.of([Terms(users=(1,), taps=("fifteen-bytes--*",))])
    rule = policy.rule(Peer(1, 1, frozenset()), None)
    with pytest.raises(Refused, match="every name is taken"):
        rule.free_name(set())


def test_the_terms_cover_what_one_answer_carries() -> None:
    assert 2 * MAX_QUEUES <= 253  # SCM_MAX_FD


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"tap": "a\\n"}',
        b'{"tap": "a b"}',
        b'{"tap": "a%d"}',
        b'{"tap": "\\u0000"}',
        b'{"tap": "\\ud800"}',
        b'{"tap": ""}',
        b'{"tap": "sixteen-bytes-xx"}',
        b'{"queues": 0}',
        b'{"queues": 127}',
        b'{"queues": "1"}',
        b'{"device": "engine"}',
        b'{"device": "/dev/a b"}',
        b'{"bridge": "\\u00fc"}',
        b'{"tap": "a", "\\u001b[31m": 1}',
        b"[" * 4000,
        b'{"x":' * 800,
    ],
)
def test_what_is_no_request_is_refused_in_one_printable_line(data: bytes) -> None:
    with pytest.raises(Refused, match="no request") as caught:
        parse_request(data)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


@given(st.binary(max_size=200))
def test_no_bytes_break_the_parser(data: bytes) -> None:
    with suppress(Refused):
        parse_request(data)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (Refused("no", hint="ask"), Refused),
        (InvalidArgument("no tap", hint="another"), InvalidArgument),
        (kernel_error(16, "TUNSETIFF", "vm-0 queue 0", "wait"), KernelError),
    ],
)
def test_an_error_arrives_as_it_was(error: VhostctlError, kind: type[VhostctlError]) -> None:
    from msgspec import json

    with pytest.raises(kind) as caught:
        parse_answer(json.encode(denial(error)), "/run/x.sock")
    assert str(caught.value) == str(error)


def test_what_is_no_answer_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="is that the broker's socket"):
        parse_answer(b"QMP", "/run/x.sock")
    assert parse_answer(b'{"answer":"granted","tap":"a","created":true}', "") == Granted("a", True)


def test_a_request_needs_to_say_nothing() -> None:
    assert parse_request(b"{}") == Request(tap=None, queues=1, bridge=None, device=DEFAULT_PATH)
