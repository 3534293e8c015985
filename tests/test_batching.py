import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlloop.batching import Microbatch, pack
from rlloop.types import Sample


def sample(prompt: list[int], rest: list[int], loss_mask: list[bool], prompt_id: int = 0) -> Sample:
    tokens = np.array(prompt + rest, dtype=np.int32)
    mask = np.array([False] * len(prompt) + loss_mask)
    zeros = np.zeros(len(tokens), dtype=np.float32)
    return Sample(tokens, mask, zeros, zeros, zeros, prompt_id)


@st.composite
def batches(draw: st.DrawFn) -> list[Sample]:
    """Groups with prompts of their own, some members with another prompt; multi-turn masks; members without any loss."""
    samples = []
    token = st.integers(0, 3)
    for prompt_id in range(draw(st.integers(1, 4))):
        prompt = draw(st.lists(token, min_size=1, max_size=8))
        for _ in range(draw(st.integers(1, 5))):
            other = draw(st.booleans())
            rest = draw(st.lists(token, min_size=1, max_size=10))
            mask = draw(st.lists(st.booleans(), min_size=len(rest), max_size=len(rest)))
            samples.append(
                sample(draw(st.lists(token, min_size=1, max_size=8)) if other else prompt, rest, mask, prompt_id)
            )
    return draw(st.permutations(samples))


def context_of(microbatch: Microbatch, index: int) -> list[int]:
    """What the token at `index` attends to, itself included: written down again, from the segments' definition."""
    segment = int(np.searchsorted(microbatch.segment_starts, index, side="right")) - 1
    start = microbatch.segment_starts[segment]
    own = list(microbatch.tokens[start : index + 1])
    prefix = microbatch.segment_prefixes[segment]
    if prefix < 0:
        return own
    start = microbatch.segment_starts[prefix]
    return list(microbatch.tokens[start : start + microbatch.segment_lengths[prefix]]) + own


@settings(deadline=None)  # the machine may be busy
@given(batches(), st.integers(1, 40), st.booleans(), st.integers(1, 3))
def test_every_loss_token_once_from_its_own_context(
    samples: list[Sample], max_tokens: int, share: bool, num_parts: int
) -> None:
    parts = [pack(samples, max_tokens, share_prefixes=share, part=p, num_parts=num_parts) for p in range(num_parts)]
    microbatches = [microbatch for part in parts for microbatch in part]
    flat = [(index, position) for index, s in enumerate(samples) for position in range(len(s.tokens))]
    seen = []
    for microbatch in microbatches:
        assert microbatch.segment_lengths.sum() == len(microbatch.tokens)
        assert (np.diff(microbatch.loss_index) > 0).all()
        for hidden, target, place in zip(
            microbatch.hidden_index, microbatch.targets, microbatch.loss_index, strict=True
        ):
            index, position = flat[place]
            seen.append((index, position))
            assert target == samples[index].tokens[position]
            assert context_of(microbatch, hidden) == list(samples[index].tokens[:position])
            assert microbatch.positions[hidden] == position - 1
    assert sorted(seen) == [(i, p) for i, p in flat if samples[i].loss_mask[p]]


@settings(deadline=None)  # the machine may be busy
@given(batches(), st.integers(1, 40), st.booleans())
def test_budget(samples: list[Sample], max_tokens: int, share: bool) -> None:
    for microbatch in pack(samples, max_tokens, share_prefixes=share):
        if len(microbatch.tokens) > max_tokens:  # then it is one sample
            assert len(microbatch.segment_starts) == 1
        if not share:
            assert (microbatch.segment_prefixes == -1).all()


def test_parts_are_alike_though_microbatches_are_not() -> None:
    """32 groups of 10 tokens, of which a microbatch holds three: eleven microbatches, but each part has 16 groups."""
    samples = [sample([1, 2, 3, 4], [5, 6, 7, 8], [True] * 4, prompt_id=index // 2) for index in range(64)]
    for num_parts, each in ((1, 32), (2, 16), (4, 8)):
        for part in range(num_parts):
            sizes = [len(microbatch.tokens) for microbatch in pack(samples, 34, part=part, num_parts=num_parts)]
            assert sizes == [30] * (each // 3) + [10 * (each % 3)]
    few = [sample([1, 2, 3, 4], [5, 6, 7, 8], [True] * 4, prompt_id=index) for index in range(2)]
    assert [len(pack(few, 100, part=part, num_parts=2)) for part in range(2)] == [1, 1], "one would hold both"


@settings(deadline=None)  # the machine may be busy
@given(batches())
def test_sharing_never_costs_tokens(samples: list[Sample]) -> None:
    counts = [sum(len(m.tokens) for m in pack(samples, 10_000, share_prefixes=share)) for share in (True, False)]
    assert counts[0] <= counts[1]


def test_prompt_is_computed_once_and_last_token_not_at_all() -> None:
    prompt = [7] * 30
    samples = [sample(prompt, [i] * 12, [True] * 12) for i in range(8)]
    (microbatch,) = pack(samples, 2048)
    assert len(microbatch.tokens) == 30 + 8 * 11
    assert len(microbatch.targets) == 8 * 12


def test_prompts_are_shared_only_within_equal_ids_and_tokens() -> None:
    samples = [sample([1, 2], [3], [True], 0), sample([1, 2], [3], [True], 1), sample([1, 4], [3], [True], 0)]
    (microbatch,) = pack(samples, 100)
    assert len(microbatch.tokens) == 6


def test_groups_stay_together_when_they_fit() -> None:
    samples = [sample([group] * 4, [1, 2, 3], [True] * 3, group) for group in (0, 1, 2) for _ in range(3)]
    microbatches = pack(samples, 20)  # a group is 4 + 3 * 2 = 10 tokens
    assert [len(m.tokens) for m in microbatches] == [20, 10]


def test_group_over_the_budget_is_split_in_few_parts() -> None:
    samples = [sample([5] * 10, [1] * 6, [True] * 6) for _ in range(8)]  # 10 + 8 * 5 = 50 tokens
    assert [len(m.tokens) for m in pack(samples, 30)] == [30, 30]


def test_sample_over_the_budget_gets_its_own() -> None:
    long, short = sample([1] * 50, [2] * 3, [True] * 3), sample([1] * 2, [2] * 3, [True] * 3, prompt_id=1)
    assert sorted(len(m.tokens) for m in pack([long, short], 16)) == [4, 52]


def test_first_token_cannot_carry_loss() -> None:
    with pytest.raises(ValueError, match="sample 1: its first token"):
        pack([sample([1], [2], [True]), sample([], [2], [True])], 16)


def test_parts_are_alike_though_groups_are_not() -> None:
    """The large group comes last; in this order one part would have all of it and a small one."""
    samples = [sample([1], [2] * size, [True] * size, prompt_id=index) for index, size in enumerate([1, 1, 1, 3])]
    parts = [pack(samples, 100, part=part, num_parts=2) for part in range(2)]
    assert [sum(len(microbatch.tokens) for microbatch in part) for part in parts] == [3, 3]


def test_the_largest_microbatch_comes_first() -> None:
    """Its memory serves the others."""
    samples = [sample([1] * 4, [2] * size, [True] * size, prompt_id=size) for size in (6, 5, 3)]
    assert [len(microbatch.tokens) for microbatch in pack(samples, 14)] == [14, 9]  # of 8 and 6; of 9
