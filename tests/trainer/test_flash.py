"""What FlashAttention is told, checked without it: index arithmetic on a CPU. tests/gpu runs it."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from rlloop.batching import Microbatch, pack
from rlloop.trainer.attention import PackedLayout
from rlloop.trainer.flash import FlashLayout, _Gather, count_keys, ends, index_keys
from rlloop.trainer.megatron.room import Room, fill, fitting_size, needed_room
from rlloop.types import Sample

CPU = torch.device("cpu")
MakeSamples = Callable[..., list[Sample]]


def by_segment(microbatch: Microbatch, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """What the kernel computes, by its definition: causal, aligned to the last key."""
    layout = FlashLayout.of(microbatch, CPU)
    index = torch.arange(len(key)) if layout.key_index is None else layout.key_index
    parts = []
    for segment in range(len(layout.query_ends) - 1):
        q = query[layout.query_ends[segment] : layout.query_ends[segment + 1]]
        keys = index[layout.key_ends[segment] : layout.key_ends[segment + 1]]
        assert len(keys) <= layout.longest
        mask = torch.ones(len(q), len(keys), dtype=torch.bool).tril(len(keys) - len(q))
        groups = query.shape[1] // key.shape[1]
        k, v = (tensor[keys].repeat_interleave(groups, dim=1).transpose(0, 1) for tensor in (key, value))
        parts.append(F.scaled_dot_product_attention(q.transpose(0, 1), k, v, attn_mask=mask).transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("share_prefixes", [True, False])
def test_layout_is_that_of_packed_attention(make_samples: MakeSamples, share_prefixes: bool) -> None:
    for microbatch in pack(make_samples(), 60, share_prefixes=share_prefixes):
        query, key, value = (torch.randn(len(microbatch.tokens), heads, 8) for heads in (4, 2, 2))
        expected = PackedLayout(microbatch, device=CPU, dtype=torch.float32).attend(query, key, value, 8**-0.5)
        torch.testing.assert_close(by_segment(microbatch, query, key, value), expected, atol=1e-5, rtol=1e-5)


def test_what_is_no_key_has_no_gradient() -> None:
    packed = torch.randn(4, 1, 2).requires_grad_()
    index, key_ends = torch.tensor([0, 1, 0, 3, 0]), torch.tensor([0, 2, 4])
    gradient = torch.full((5, 1, 2), torch.nan)
    gradient[:4] = torch.arange(4.0)[:, None, None]
    _Gather.apply(packed, index, key_ends).backward(gradient)
    assert packed.grad is not None
    assert packed.grad[:, 0, 0].tolist() == [0.0 + 2.0, 1.0, 0.0, 3.0]


@given(
    prompts=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    group_size=st.integers(1, 4),
    extra=st.integers(0, 80),
    shared=st.booleans(),
)
def test_filling_up_leaves_what_is_there(prompts: list[int], group_size: int, extra: int, shared: bool) -> None:
    samples = [
        Sample(
            tokens=np.arange(length + 3, dtype=np.int32),
            loss_mask=np.arange(length + 3) >= length,
            rollout_logprobs=np.zeros(length + 3, dtype=np.float32),
            advantages=np.zeros(length + 3, dtype=np.float32),
            loss_weights=np.zeros(length + 3, dtype=np.float32),
            prompt_id=group,
        )
        for group, length in enumerate(prompts)
        for _ in range(group_size)
    ]
    (microbatch,) = pack(samples, 10_000, share_prefixes=shared)
    num_tokens, num_segments = len(microbatch.tokens), len(microbatch.segment_lengths)
    room = Room(num_tokens + extra, 2, 0, 4)
    room = room.grown(needed_room(microbatch, room.num_tokens))
    full = fill(microbatch, room)
    for name in ("segment_starts", "segment_lengths", "segment_prefixes"):
        assert len(getattr(full, name)) == room.num_segments
        np.testing.assert_array_equal(getattr(full, name)[:num_segments], getattr(microbatch, name))
    np.testing.assert_array_equal(full.tokens[:num_tokens], microbatch.tokens)
    assert ends(full.segment_lengths)[-1] == len(full.tokens) == len(full.positions) == room.num_tokens
    assert count_keys(full).max() <= room.longest
    if room.num_keys:
        assert len(index_keys(full)) <= room.num_keys
    else:
        np.testing.assert_array_equal(index_keys(full), np.arange(room.num_tokens))
    assert room.grown(needed_room(full, room.num_tokens)) == room
    assert replace(full, tokens=microbatch.tokens).hidden_index is microbatch.hidden_index


@pytest.mark.parametrize(
    ("num_tokens", "size"),
    [
        (2049, None),
        (2048, 2048),
        (1537, 2048),
        (1536, 1536),
        (1152, 1152),
        (865, 1152),
        (273, 273),
        (272, 273),
        (1, 273),
    ],
)
def test_a_room_is_at_most_a_third_larger_than_what_it_holds(num_tokens: int, size: int | None) -> None:
    """From 2048: 1536, 1152, 864, 648, 486, 364, 273, and nothing smaller."""
    assert fitting_size(num_tokens, 2048) == size


def test_a_small_largest_room_is_the_only_one() -> None:
    assert fitting_size(3, 100) == 100
