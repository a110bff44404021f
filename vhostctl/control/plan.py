"""Bring-up as data: named steps, each with its undo."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

Observer = Callable[["Step"], None]


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to do, and `undo`, which takes it back.

    `undo` must be harmless when `do` failed or was interrupted half-way.
    """

    name: str
    target: str
    detail: str
    do: Callable[[], object]
    undo: Callable[[], object] | None = None

    def __str__(self) -> str:
        return " ".join(part for part in (self.name, self.target, self.detail) if part)


class Plan:
    """Steps in order, and how far they have been taken."""

    def __init__(self, steps: Iterable[Step]) -> None:
        self.steps = tuple(steps)
        self.broken = False
        """Whether a step could not be taken back: nobody knows what is left of it."""
        self._done: list[Step] = []

    def run(self, observe: Observer | None = None) -> None:
        """Take every step; if one fails, undo those before it and raise its error.

        `observe` is called before each step; what it raises counts as that step's failure.
        """
        try:
            for step in self.steps[len(self._done) :]:
                if observe is not None:
                    observe(step)
                self._done.append(step)  # before do(): ctrl-C may come between the two
                step.do()
        except BaseException as error:
            self._undo_after(error)
            raise

    def undo(self) -> None:
        """Take back every step that was taken, last first; raise the first error at the end."""
        failure: BaseException | None = None
        while self._done:
            step = self._done.pop()
            if step.undo is None:
                continue
            try:
                step.undo()
            except BaseException as error:  # noqa: BLE001 -- the steps below must be undone too
                failure = failure or error
        if failure is not None:
            self.broken = True
            raise failure

    def _undo_after(self, error: BaseException) -> None:
        try:
            self.undo()
        except BaseException as second:  # noqa: BLE001 -- the first error is the one to report
            error.add_note(f"while undoing: {second}")
