"""A step that KVM takes, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vhostctl.errors import VhostctlError


@contextmanager
def whole(discard: Callable[[], None]) -> Iterator[None]:
    """Call `discard` if the block is interrupted, when nobody knows what KVM did.

    A refusal of KVM's passes: it did nothing then.
    """
    try:
        yield
    except VhostctlError:
        raise
    except BaseException:
        discard()
        raise
