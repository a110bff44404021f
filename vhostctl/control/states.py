"""The order of a session's calls: which state each needs, and which it leads to."""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass

from vhostctl.errors import StateError


class State(enum.Enum):
    """How far a session is; docs/states.md has the picture."""

    NEW = "new"
    OPENED = "opened"
    OWNED = "owned"
    NEGOTIATED = "negotiated"
    MAPPED = "mapped"
    RINGS_SET = "rings set"
    RUNNING = "running"
    STOPPED = "stopped"
    FAILED = "failed"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Call:
    """A call may come in the states `needs`; `leads_to` is the next state, None: the same."""

    needs: frozenset[State]
    leads_to: State | None = None


def _in(*states: State) -> frozenset[State]:
    return frozenset(states)


_BEFORE = (State.NEW, State.OPENED, State.OWNED, State.NEGOTIATED, State.MAPPED)
_PLACED = _in(State.RINGS_SET, State.RUNNING, State.STOPPED)

CALLS: dict[str, Call] = {
    "open": Call(_in(State.NEW), State.OPENED),
    "own": Call(_in(State.OPENED), State.OWNED),
    "negotiate": Call(_in(State.OWNED), State.NEGOTIATED),
    "map": Call(_in(State.NEGOTIATED), State.MAPPED),
    "prepare": Call(_in(State.NEW), State.MAPPED),
    "catch_up": Call(_in(*_BEFORE, State.STOPPED)),
    "set_rings": Call(_in(State.MAPPED, State.STOPPED), State.RINGS_SET),
    "start": Call(_in(State.MAPPED, State.RINGS_SET, State.STOPPED), State.RUNNING),
    "stop": Call(_in(State.RUNNING), State.STOPPED),
    "snapshot": Call(_PLACED),
    "suspend": Call(_in(State.RUNNING, State.STOPPED), State.STOPPED),
    "set_link": Call(_in(State.RUNNING)),
    "enable_pair": Call(_in(State.RUNNING)),
    "disable_pair": Call(_in(State.RUNNING)),
    "replace_tap": Call(_in(State.RUNNING)),
    "stop_ring": Call(_in(State.RUNNING)),
    "start_ring": Call(_in(State.RUNNING)),
    "mask": Call(_PLACED),
    "unmask": Call(_PLACED),
    "kick": Call(_PLACED),
    "ring_status": Call(_PLACED),
    "ring_errors": Call(frozenset(State) - _in(State.NEW, State.CLOSED)),
    "set_busyloop": Call(_in(State.MAPPED) | _PLACED),
    "start_log": Call(_PLACED),
    "sync_log": Call(_PLACED),
    "stop_log": Call(_PLACED),
    "close": Call(frozenset(State), State.CLOSED),
}
"""Every call of a session whose order matters."""

# The way that is shown to whoever came too early: one call for each thing that happens.
_WAY = ("open", "own", "negotiate", "map", "set_rings", "start", "stop")


def path(state: State, call: str) -> tuple[str, ...] | None:
    """Return the shortest list of calls that make `call` possible; None if there is none."""
    needs = CALLS[call].needs
    queue: deque[tuple[State, tuple[str, ...]]] = deque([(state, ())])
    seen = {state}
    while queue:
        here, way = queue.popleft()
        if here in needs:
            return way
        for name in _WAY:
            there = CALLS[name].leads_to
            if here in CALLS[name].needs and there is not None and there not in seen:
                seen.add(there)
                queue.append((there, (*way, name)))
    return None


def check(state: State, call: str) -> None:
    """Raise StateError, which names the right order, unless `call` may come in `state`."""
    way = path(state, call)
    if way == ():
        return
    if way is not None:
        hint = f"call {', '.join(f'{name}()' for name in way)} first"
    elif state is State.FAILED:
        hint = "close() is all that is left of it"
    else:
        needs = " or ".join(s.value for s in State if s in CALLS[call].needs)
        hint = f"it comes while a session is {needs}: make a new one"
    raise StateError(f"{call}(): the session is {state.value}", hint=hint)
