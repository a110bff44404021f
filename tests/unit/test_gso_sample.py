"""The sets of offloads that test_gso.py tries: what they are a sample of, and how good a one."""

from __future__ import annotations

from tests.support.gso import (
    INTO,
    OUT_OF,
    SAMPLE,
    Pairs,
    each_side,
    everything,
    lanes,
    outcomes,
    sample,
    tried,
)


def test_negotiation_gives_a_side_225_outcomes() -> None:
    assert len(outcomes(INTO + OUT_OF)) == 225
    for side in zip(*everything(), strict=True):
        assert sorted(set(side)) == outcomes(INTO + OUT_OF)


def test_the_sample_has_every_pair_of_two_bits_values() -> None:
    there, seen = Pairs(), Pairs()
    for sides in everything():
        there.add(sides)
    for sides in sample():
        seen.add(sides)
    assert seen.values == there.values


def test_a_long_run_has_each_outcome_and_each_way_all_that_it_can() -> None:
    assert len({first for first, _ in each_side()}) == len(each_side()) == 225
    ways = {lane for sides in each_side() for lane in lanes(*sides)}
    assert ways == {lane for sides in everything() for lane in lanes(*sides)}
    assert tried(SAMPLE + 225) == sample() + each_side()
