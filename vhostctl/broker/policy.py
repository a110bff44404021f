"""Who may have which tap, with how many queues, on which bridge and device."""

from __future__ import annotations

import grp
import pwd
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import count
from pathlib import Path
from typing import Annotated, Self

from msgspec import Meta, Struct

from vhostctl.abi import tun
from vhostctl.broker.peer import Peer
from vhostctl.broker.protocol import MAX_QUEUES, LinkName, NodePath, Refused, Request
from vhostctl.config import load
from vhostctl.errors import InvalidArgument
from vhostctl.host.vhost import DEFAULT_PATH

Pattern = Annotated[str, Meta(pattern=r"\A[!-$&-.0-9;-~]{1,64}\Z")]
Positive = Annotated[int, Meta(ge=1)]
_Name = str | int
_REMEDY = "have the broker's policy changed, or ask for less"


class Terms(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table ``[[allow]]`` of a policy file.

    `users` and `groups` are names or numbers, one of which a caller has to be or be in. `taps`
    are patterns as a shell's (``vm-*``). `bridges` may be joined, `devices` opened. A call gets at
    most `max_queues` pairs, a user `per_user` taps at once. `fork_from_owner` decides whether
    the workers will be threads of the receiver; without it the kernel decides.
    """

    users: tuple[_Name, ...] = ()
    groups: tuple[_Name, ...] = ()
    taps: Annotated[tuple[Pattern, ...], Meta(min_length=1)]
    bridges: tuple[LinkName, ...] = ()
    devices: Annotated[tuple[NodePath, ...], Meta(min_length=1)] = (DEFAULT_PATH,)
    max_queues: Annotated[int, Meta(ge=1, le=MAX_QUEUES)] = 1
    per_user: Positive = 8
    fork_from_owner: bool | None = None

    def __post_init__(self) -> None:
        """Raise InvalidArgument, which begins with the key, for somebody who is not here."""
        if not self.users and not self.groups:
            raise InvalidArgument("neither users nor groups: nobody could use it")
        self.uids()
        self.gids()

    def uids(self) -> frozenset[int]:
        """Return the numbers of `users`. Raises InvalidArgument."""
        return frozenset(_numbers("users", self.users, lambda name: pwd.getpwnam(name).pw_uid))

    def gids(self) -> frozenset[int]:
        """Return the numbers of `groups`. Raises InvalidArgument."""
        return frozenset(_numbers("groups", self.groups, lambda name: grp.getgrnam(name).gr_gid))


class _File(Struct, frozen=True, forbid_unknown_fields=True):
    allow: tuple[Terms, ...] = ()


def _numbers(key: str, names: tuple[_Name, ...], find: Callable[[str], int]) -> Iterator[int]:
    for index, name in enumerate(names):
        if isinstance(name, int) or name.isdecimal():
            yield int(name)
            continue
        try:
            yield find(name)
        except (KeyError, ValueError) as error:
            raise InvalidArgument(
                f"{key}[{index}]: {name!r} is not known here", hint="write a name or a number"
            ) from error


@dataclass(frozen=True, slots=True)
class Rule:
    """One table of the policy, with names resolved; `label` says which (``allow[0]``)."""

    label: str
    uids: frozenset[int]
    gids: frozenset[int]
    terms: Terms

    def names(self, peer: Peer) -> bool:
        """Whether it is about `peer`."""
        return peer.uid in self.uids or not self.gids.isdisjoint(peer.gids)

    def covers(self, tap: str | None) -> bool:
        """Whether it allows the tap `tap`, or has a name to choose if that is None."""
        if tap is None:
            return any(_stem(pattern) is not None for pattern in self.terms.taps)
        return any(fnmatchcase(tap, pattern) for pattern in self.terms.taps)

    def check(self, request: Request) -> None:
        """Raise Refused, saying what it lacks, for what `request` wants besides its tap."""
        terms = self.terms
        if request.queues > terms.max_queues:
            raise self._lacks(f"max_queues is {terms.max_queues}, not {request.queues}")
        if request.device not in terms.devices:
            raise self._lacks(f"devices has {', '.join(terms.devices)}, not {request.device}")
        if request.bridge is not None:
            self.check_bridge(request.bridge)

    def check_bridge(self, bridge: str) -> None:
        """Raise Refused if a tap may not be on `bridge`."""
        allowed = self.terms.bridges
        if bridge not in allowed:
            raise self._lacks(f"bridges has {', '.join(allowed) or 'none'}, not {bridge}")

    def check_count(self, taps: int) -> None:
        """Raise Refused if a user who has `taps` of them may have no other."""
        if taps >= self.terms.per_user:
            raise self._lacks(f"per_user is {self.terms.per_user}, and {taps} are there")

    def free_name(self, taken: Collection[str]) -> str:
        """Return a name of a pattern that ends in ``*`` which no link in `taken` has."""
        stems = (_stem(pattern) for pattern in self.terms.taps)
        stem = next(stem for stem in stems if stem is not None)
        name = next(name for name in (f"{stem}{index}" for index in count()) if name not in taken)
        if len(name) >= tun.IFNAMSIZ:
            raise self._lacks(f"taps has {stem}*, of which every name is taken")
        return name

    def _lacks(self, what: str) -> Refused:
        return Refused(f"{self.label}: {what}", hint=_REMEDY)


def _stem(pattern: str) -> str | None:
    """Return what precedes the star of a pattern that has nothing else special."""
    stem = pattern.removesuffix("*")
    return stem if stem not in ("", pattern) and not set(stem) & set("*?[") else None


@dataclass(frozen=True, slots=True)
class Policy:
    """The rules, in their order; the first that names caller and tap decides."""

    rules: tuple[Rule, ...]

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a policy file.

        Raises InvalidArgument, which names file, line and key, and KernelError (ENOENT...).
        """
        return cls.of(load(path, _File).allow)

    @classmethod
    def of(cls, tables: Collection[Terms]) -> Self:
        """Make a policy of `tables`, resolving names. Raises InvalidArgument."""
        return cls(
            tuple(
                Rule(f"allow[{index}]", terms.uids(), terms.gids(), terms)
                for index, terms in enumerate(tables)
            )
        )

    def rule(self, peer: Peer, tap: str | None) -> Rule:
        """Return the rule that decides. Raises Refused if none does."""
        theirs = [rule for rule in self.rules if rule.names(peer)]
        if not theirs:
            raise Refused(f"no rule names {peer.user}", hint=_REMEDY)
        for rule in theirs:
            if rule.covers(tap):
                return rule
        asked = "has a pattern to choose a tap by" if tap is None else f"names tap {tap}"
        raise Refused(f"no rule for {peer.user} {asked}", hint=_REMEDY)
