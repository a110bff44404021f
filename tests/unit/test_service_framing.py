"""How a stream of bytes becomes messages."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from vhostctl.service.framing import Framer, MalformedError

TEXT = st.text('a"\\{}[]ö\n', max_size=6)
JSON = st.recursive(
    st.none() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.lists(st.dictionaries(TEXT, JSON, max_size=3), max_size=4)


@settings(max_examples=100, deadline=None)
@given(OBJECTS, st.integers(1, 30), st.sampled_from(["", "\n", "\r\n \t"]), st.booleans())
def test_a_framer_finds_what_was_sent(
    objects: list[object], piece: int, between: str, ascii_only: bool
) -> None:
    stream = "".join(json.dumps(each, ensure_ascii=ascii_only) + between for each in objects)
    data = stream.encode()
    framer = Framer()
    found = []
    for start in range(0, len(data), piece):
        framer.feed(data[start : start + piece])
        while (message := framer.next()) is not None:
            found.append(message)
    assert [json.loads(message) for message in found] == objects
    assert not framer.partial


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.integers(1, 50))
def test_a_framer_takes_any_bytes(data: bytes, piece: int) -> None:
    framer = Framer()
    try:
        for start in range(0, len(data), piece):
            framer.feed(data[start : start + piece])
            while framer.next() is not None:
                pass
    except MalformedError:
        pass
