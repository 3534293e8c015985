"""The rule by itself, against a brute-force schedule."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlloop.staleness import Backlog
from rlloop.types import Group, Prompt


def group(ordinal: int, version: int) -> Group:
    return Group(Prompt(ordinal, ordinal, 0, None), (), (), version)


def backlog(on_stale: str, bound: int = 1, groups_per_step: int = 2, cap: int = 4) -> Backlog:
    return Backlog(groups_per_step, bound, on_stale, cap)  # type: ignore[arg-type]


def test_the_oldest_are_trained_first() -> None:
    waiting = backlog("correct")
    for ordinal, version in [(5, 1), (3, 0), (4, 1), (2, 1)]:
        waiting.start(version)
        waiting.finish(group(ordinal, version))
    assert [g.prompt.ordinal for g in waiting.take_batch(1) or ()] == [3, 2]
    assert [g.prompt.ordinal for g in waiting.take_batch(2) or ()] == [4, 5]
    assert waiting.take_batch(3) is None


def test_too_few_groups_make_no_batch() -> None:
    waiting = backlog("correct")
    waiting.start(0)
    waiting.finish(group(0, 0))
    assert waiting.take_batch(0) is None


@pytest.mark.parametrize(("on_stale", "limit"), [("drop", 1), ("wait", 1), ("correct", 4)])
def test_what_is_beyond_the_limit_is_stale(on_stale: str, limit: int) -> None:
    waiting = backlog(on_stale)
    waiting.start(0)
    waiting.finish(group(0, 0))
    assert waiting.take_stale(limit) == []
    assert [g.prompt.ordinal for g in waiting.take_stale(limit + 1)] == [0]
    assert waiting.take_stale(limit + 1) == []


def test_wait_holds_the_update_for_a_straggler_that_would_become_too_old() -> None:
    waiting = backlog("wait", bound=1, groups_per_step=2)
    for ordinal, version in enumerate([0, 1, 1]):
        waiting.start(version)
        if version == 1:
            waiting.finish(group(ordinal, version))
    assert waiting.take_batch(1) is None, "version 0 must be trained by trainer version 1, and is not in"
    waiting.finish(group(0, 0))
    assert [g.policy_version for g in waiting.take_batch(1) or ()] == [0, 1]


def test_wait_counts_what_fits_into_the_steps_that_remain() -> None:
    waiting = backlog("wait", bound=2, groups_per_step=1)
    for version in (0, 0, 1):
        waiting.start(version)
    waiting.finish(group(2, 1))
    # Two groups of version 0 are due by version 2: at trainer version 1, there is room for one after this step.
    assert waiting.take_batch(1) is None
    waiting.finish(group(0, 0))
    assert [g.prompt.ordinal for g in waiting.take_batch(1) or ()] == [0]


@given(
    versions=st.lists(st.integers(0, 3), min_size=2, max_size=7),
    finished=st.integers(0, 127),
    bound=st.integers(0, 3),
)
def test_wait_trains_only_what_leaves_a_schedule_for_the_rest(versions: list[int], finished: int, bound: int) -> None:
    """Oracle: every assignment of the other groups to later steps, by brute force."""
    now, per_step = 3, 2
    versions = [v for v in versions if now - v <= bound]
    waiting = backlog("wait", bound=bound, groups_per_step=per_step)
    done = [ordinal for ordinal in range(len(versions)) if finished >> ordinal & 1]
    for ordinal, version in enumerate(versions):
        waiting.start(version)
        if ordinal in done:
            waiting.finish(group(ordinal, version))
    batch = waiting.take_batch(now)
    if len(done) < per_step:
        assert batch is None
        return
    oldest = sorted(done, key=lambda ordinal: (versions[ordinal], ordinal))[:per_step]
    rest = [versions[ordinal] + bound for ordinal in range(len(versions)) if ordinal not in oldest]
    assert (batch is not None) == schedulable(rest, now + 1, per_step)


def schedulable(deadlines: list[int], step: int, per_step: int) -> bool:
    """Whether some choice of at most `per_step` groups at each step from `step` on meets all deadlines."""
    if not deadlines:
        return True
    if min(deadlines) < step:
        return False
    size = min(per_step, len(deadlines))
    return any(
        schedulable([d for i, d in enumerate(deadlines) if i not in chosen], step + 1, per_step)
        for chosen in combinations(range(len(deadlines)), size)
    )


def test_wait_leaves_out_the_oldest_of_what_is_finished_in_whatever_order_it_came() -> None:
    waiting = backlog("wait", bound=2, groups_per_step=2)
    for ordinal, version in enumerate([1, 2, 1]):
        waiting.start(version)
        waiting.finish(group(ordinal, version))
    # Both of version 1 are due now, and are trained now; that of version 2 has a step more.
    assert [g.prompt.ordinal for g in waiting.take_batch(3) or ()] == [0, 2]


def test_a_late_step_costs_no_more_than_an_early_one() -> None:
    waiting = backlog("wait", groups_per_step=1)
    for version in range(100):
        waiting.start(version)
        waiting.start(version)
        waiting.abandon(version)
        waiting.finish(group(version, version))
        assert waiting.take_batch(version) is not None
    assert len(waiting._outstanding) == 0
