"""Bytes of a stream into JSON objects, each bounded, before anything decodes them."""

from __future__ import annotations

import re

from vhostctl.errors import VhostctlError

MOST_BYTES = 64 << 10
MOST_NESTED = 32

_BLANK = b" \t\r\n"
_OUTSIDE = re.compile(rb'["{}\[\]]')
_IN_STRING = re.compile(rb'"|\\.', re.DOTALL)


class MalformedError(VhostctlError):
    """What came cannot be the start of a message: there is no telling where the next begins."""


class Framer:
    """Cuts a stream of JSON objects apart, whether or not something blank is between them.

    It looks at brackets and strings only; a decoder has the last word on each message.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._at = 0  # what is before this has been looked at
        self._depth = 0
        self._in_string = False

    @property
    def partial(self) -> bool:
        """Whether a message has begun and not ended."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> None:
        """Append what was read; then call `next()` until it returns None."""
        self._buffer += data

    def next(self) -> bytes | None:
        """Return the next whole message, or None if it is not all there yet.

        Raises MalformedError if it is no object, longer than MOST_BYTES, or nested deeper
        than MOST_NESTED.
        """
        if self._at == 0:
            del self._buffer[: len(self._buffer) - len(self._buffer.lstrip(_BLANK))]
            if not self._buffer:
                return None
            if not self._buffer.startswith(b"{"):
                raise MalformedError("JSON parse error: a message is an object, in braces")
        whole = self._scan()
        if (self._at if whole else len(self._buffer)) > MOST_BYTES:
            raise MalformedError(f"a message of more than {MOST_BYTES} bytes")
        if not whole:
            return None
        message = bytes(self._buffer[: self._at])
        del self._buffer[: self._at]
        self._at = 0
        return message

    def _scan(self) -> bool:
        """Go on to the end of the message; return whether it is there."""
        while found := (_IN_STRING if self._in_string else _OUTSIDE).search(self._buffer, self._at):
            self._at = found.end()
            token = found[0]
            if token == b'"':
                self._in_string = not self._in_string
            elif token in b"{[":
                self._depth += 1
                if self._depth > MOST_NESTED:
                    raise MalformedError(f"a message nested deeper than {MOST_NESTED}")
            elif token in b"}]":
                self._depth -= 1
                if self._depth == 0:
                    return True
        # A backslash at the very end, unless escaped, escapes what has not come yet.
        self._at = max(self._at, len(self._buffer) - self._buffer.endswith(b"\\"))
        return False
