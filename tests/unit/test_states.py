"""The order of calls as a table: what may come when, and the way that is shown."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from vhostctl.control.session import Session
from vhostctl.control.states import CALLS, State, check, path
from vhostctl.errors import StateError

N, P, W, G, M = State.NEW, State.OPENED, State.OWNED, State.NEGOTIATED, State.MAPPED
R, U, S, F, C = State.RINGS_SET, State.RUNNING, State.STOPPED, State.FAILED, State.CLOSED

# For each call a letter for each state in this order; y: it may come.
ORDER = (N, P, W, G, M, R, U, S, F, C)
TABLE = {
    #               NPWGMRUSFC
    "open": "y.........",
    "own": ".y........",
    "negotiate": "..y.......",
    "map": "...y......",
    "prepare": "y.........",
    "catch_up": "yyyyy..y..",
    "set_rings": "....y..y..",
    "start": "....yy.y..",
    "stop": "......y...",
    "snapshot": ".....yyy..",
    "suspend": "......yy..",
    "set_link": "......y...",
    "enable_pair": "......y...",
    "disable_pair": "......y...",
    "replace_tap": "......y...",
    "stop_ring": "......y...",
    "start_ring": "......y...",
    "mask": ".....yyy..",
    "unmask": ".....yyy..",
    "kick": ".....yyy..",
    "ring_status": ".....yyy..",
    "ring_errors": ".yyyyyyyy.",
    "set_busyloop": "....yyyy..",
    "start_log": ".....yyy..",
    "sync_log": ".....yyy..",
    "stop_log": ".....yyy..",
    "close": "yyyyyyyyyy",
}
# Public methods without a rule, and why they need none.
NO_RULE = {
    "hva": "a question to memory, which says itself what is not there",
    "resume": "it makes a session",
}
PAIRS = [(state, call) for call in TABLE for state in ORDER]


def test_the_table_is_whole() -> None:
    assert set(TABLE) == set(CALLS)
    assert set(ORDER) == set(State)


def test_every_public_method_has_a_rule() -> None:
    methods = inspect.getmembers(Session, inspect.isroutine)
    public = {name for name, _ in methods if not name.startswith("_")}
    assert public == set(CALLS) | set(NO_RULE)
    assert not set(CALLS) & set(NO_RULE)


@pytest.mark.parametrize(("state", "call"), PAIRS, ids=lambda part: getattr(part, "value", part))
def test_a_call_comes_in_its_states_only(state: State, call: str) -> None:
    if TABLE[call][ORDER.index(state)] == "y":
        check(state, call)
        return
    with pytest.raises(StateError) as refusal:
        check(state, call)
    assert f"{call}(): the session is {state.value}" in str(refusal.value)
    assert refusal.value.hint


@pytest.mark.parametrize(("state", "call"), PAIRS, ids=lambda part: getattr(part, "value", part))
def test_the_way_that_is_shown_leads_there(state: State, call: str) -> None:
    way = path(state, call)
    if way is None:
        return
    for step in way:
        assert state in CALLS[step].needs
        state = CALLS[step].leads_to or state
    assert state in CALLS[call].needs


@pytest.mark.parametrize(
    ("state", "call", "hint"),
    [
        (N, "start", "call open(), own(), negotiate(), map() first"),
        (P, "map", "call own(), negotiate() first"),
        (M, "stop", "call start() first"),
        (N, "set_link", "call open(), own(), negotiate(), map(), start() first"),
        (U, "set_rings", "call stop() first"),
        (S, "mask", ""),
        (U, "own", "it comes while a session is opened: make a new one"),
        (F, "stop", "close() is all that is left of it"),
        (C, "start", "it comes while a session is mapped or rings set or stopped"),
    ],
)
def test_the_message_has_the_right_order(state: State, call: str, hint: str) -> None:
    if not hint:
        check(state, call)
        return
    with pytest.raises(StateError, match=re.escape(hint)):
        check(state, call)


def test_the_picture_in_the_docs_is_this_table() -> None:
    text = (Path(__file__).parents[2] / "docs/states.md").read_text(encoding="utf-8")
    drawn = set(re.findall(r"^ +(\w+) --> (\w+): (\w+)$", text, re.MULTILINE))
    names = {state: state.value.replace(" ", "_") for state in State}
    table = {
        (names[state], names[call.leads_to], name)
        for name, call in CALLS.items()
        if call.leads_to and name not in ("close", "prepare")
        for state in call.needs
    }
    assert drawn == table
    made = set(re.findall(r"^ +\[\*\] --> (\w+): (\w+)$", text, re.MULTILINE))
    assert made == {("new", "Session"), ("new", "resume")}
    words = set(re.findall(r"`(?:session\.)?(\w+)(?:\(\))?`", text))
    assert set(CALLS) - {call for _, _, call in drawn} <= words
