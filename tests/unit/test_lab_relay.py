"""Bytes between the host and a VM's ports: markers, the console's tail, a fed stdin."""

from __future__ import annotations

import selectors
import socket
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from vhostctl.lab.relay import Console, Feed, MarkedStream, discard

MARKER = b"\4aab"


@given(st.lists(st.sampled_from([b"\4", b"a", b"b", b"\4aa", b"x\4a", b"\n", b"more"])))
def test_all_that_comes_before_the_marker_is_passed_on(pieces: list[bytes]) -> None:
    whole = b"".join(pieces) + MARKER
    seen = bytearray()
    stream = MarkedStream(seen.extend, MARKER)
    for piece in (*pieces, MARKER, b"after"):
        stream.feed(piece)
    assert bytes(seen) == whole[: whole.index(MARKER)]
    assert stream.ended


def test_nothing_waits_that_cannot_be_the_marker() -> None:
    seen = bytearray()
    stream = MarkedStream(seen.extend, MARKER)
    stream.feed(b"prompt: ")
    assert bytes(seen) == b"prompt: "
    stream.feed(b"\4a")
    assert bytes(seen) == b"prompt: "
    stream.flush()
    assert bytes(seen) == b"prompt: \4a"
    assert not stream.ended


def test_the_console_keeps_its_last_lines() -> None:
    passed = bytearray()
    console = Console(passed.extend)
    for number in range(500):
        console.feed(b"li")
        console.feed(b"ne %d\r\n\r\n" % number)
    tail = console.tail()
    assert tail[-1] == "line 499"
    assert 10 < len(tail) <= 100
    assert passed.count(b"line") == 500


def pump(selector: selectors.BaseSelector, port: socket.socket) -> bytes:
    """Run the selector until the other end of `port` has seen the end of its input."""
    seen = bytearray()
    port.settimeout(10)
    while True:
        for key, _ in selector.select(0):
            key.data()
        data = port.recv(1000)
        if not data:
            return bytes(seen)
        seen += data


def test_stdin_may_be_a_file_and_its_end_is_told(tmp_path: Path) -> None:
    content = bytes(range(256)) * 4000
    (tmp_path / "input").write_bytes(content)
    ours, theirs = socket.socketpair()
    with ours, theirs, open(tmp_path / "input", "rb") as source:
        with selectors.PollSelector() as selector:
            ours.setblocking(False)
            feed = Feed(source.fileno(), ours, selector)
            feed.start()
            for key, _ in selector.select(0):
                key.data()
            assert pump(selector, theirs) == content
        # The connection stays: QEMU would drop what it has not read of one that hung up.
        theirs.send(b"x")


def test_a_guest_that_closed_its_stdin_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "input").write_bytes(b"x")
    ours, theirs = socket.socketpair()
    with ours, open(tmp_path / "input", "rb") as source, selectors.PollSelector() as selector:
        theirs.close()
        Feed(source.fileno(), ours, selector).start()
        while selector.get_map():
            for key, _ in selector.select(0):
                key.data()


def test_discard_takes_anything() -> None:
    discard(b"x")
