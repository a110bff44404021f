"""Plans: order, undo, and failure at every step."""

from __future__ import annotations

from functools import partial

import pytest

from vhostctl.control.plan import Plan, Step


def recorded(count: int, log: list[str]) -> list[Step]:
    return [
        Step(f"s{n}", "", "", partial(log.append, f"do {n}"), partial(log.append, f"undo {n}"))
        for n in range(count)
    ]


def test_undo_is_the_reverse() -> None:
    log: list[str] = []
    plan = Plan(recorded(3, log))
    plan.run()
    plan.undo()
    plan.undo()
    assert log == ["do 0", "do 1", "do 2", "undo 2", "undo 1", "undo 0"]


@pytest.mark.parametrize("failing", range(4))
@pytest.mark.parametrize("error", [OSError("no"), KeyboardInterrupt()])
def test_failure_undoes_what_was_done(failing: int, error: BaseException) -> None:
    log: list[str] = []
    steps = recorded(4, log)

    def observe(step: Step) -> None:
        if step is steps[failing]:
            raise error

    with pytest.raises(type(error)):
        Plan(steps).run(observe)
    assert log == [f"do {n}" for n in range(failing)] + [
        f"undo {n}" for n in reversed(range(failing))
    ]


def test_failure_inside_a_step_undoes_that_step_too() -> None:
    log: list[str] = []

    def half() -> None:
        log.append("half")
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        Plan([Step("half", "", "", half, lambda: log.append("undo half"))]).run()
    assert log == ["half", "undo half"]


def test_error_while_undoing_becomes_a_note_and_the_rest_is_undone() -> None:
    log: list[str] = []

    def fail() -> None:
        raise OSError("second")

    steps = [*recorded(1, log), Step("bad undo", "", "", lambda: None, fail)]
    steps.append(Step("bad", "", "", lambda: (_ for _ in ()).throw(OSError("first")).__next__()))
    with pytest.raises(OSError, match="first") as caught:
        Plan(steps).run()
    assert caught.value.__notes__ == ["while undoing: second"]
    assert log == ["do 0", "undo 0"]


def test_steps_print_as_one_line() -> None:
    assert str(Step("VHOST_SET_OWNER", "pair 0", "", lambda: None)) == "VHOST_SET_OWNER pair 0"
