"""Objects that a with block closes."""

from __future__ import annotations

import abc
from typing import Self


class Closing(abc.ABC):
    """A context manager whose exit is its `close()`, whatever ended the block."""

    @abc.abstractmethod
    def close(self) -> None:
        """Give up what this object holds; a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
