"""Samples → packed microbatches under a token budget, each group's prompt computed once. Pure index arithmetic, no torch.

A microbatch is one row of T tokens without padding, cut into segments. A segment attends causally to itself and, if it
has a prefix, to all of the prefix segment as well. The samples of one group that meet in a microbatch become one prefix
segment (the tokens before their first `loss_mask`) and a segment each:

    tokens     p p p p a a a b b c c c c | q q q x x x x      two groups: one of three samples, one of a single sample
    segments   0       1     2   3         4
    prefix     -       0     0   0         -

What a sample has after the last token that predicts one with loss is not computed at all.

Shapes: T computed tokens, S segments, N tokens with loss.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlloop.types import Sample

IndexArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Microbatch:
    """What one forward and backward pass computes."""

    tokens: IndexArray
    """[T] token ids."""
    positions: IndexArray
    """[T] position of each token in its own sample."""
    segment_starts: IndexArray
    """[S] index of each segment's first token; segments are contiguous and cover all T tokens."""
    segment_lengths: IndexArray
    """[S] at least 1 (0 in rows that are filled up for a CUDA graph)."""
    segment_prefixes: IndexArray
    """[S] the segment that is this one's prefix, or -1."""
    hidden_index: IndexArray
    """[N] the token whose hidden state predicts each loss token; the last of a prefix predicts several."""
    targets: IndexArray
    """[N] the token ids that are predicted."""
    loss_index: IndexArray
    """[N] place of each loss token in the concatenation of all samples that were packed (not only this microbatch's);
    ascending, so the tokens are in the order of the samples."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """One sample, cut: `[0, split)` can be shared, `[split, end)` is its own, the rest is not needed."""

    index: int
    split: int
    end: int
    loss_positions: IndexArray
    """Of the tokens that carry loss."""

    @property
    def num_own(self) -> int:
        return self.end - self.split


@dataclass(frozen=True, slots=True)
class _Unit:
    """Samples with one common prefix that go into one microbatch."""

    pieces: list[_Piece]

    @property
    def num_tokens(self) -> int:
        return self.pieces[0].split + sum(piece.num_own for piece in self.pieces)


def pack(
    samples: Sequence[Sample], max_tokens: int, *, share_prefixes: bool = True, part: int = 0, num_parts: int = 1
) -> list[Microbatch]:
    """Microbatches that hold every loss token of the samples exactly once: this part's, of so many that compute side by side.

    No microbatch computes more than `max_tokens` tokens, except that a single sample longer than that gets one of its own.
    Groups stay together where the budget allows it. Parts are made of groups before those are packed, so they differ by one
    at most where groups are alike. Placement is best-fit decreasing (Johnson et al. 1974: at most 11/9 of the fewest
    microbatches), the largest first. Samples without a loss token are left out.

    Raises ValueError when a sample's first token carries loss: nothing predicts it.
    """
    units = [unit for group in _groups(samples, share_prefixes) for unit in _split(group, max_tokens)]
    units = _share(units, num_parts)[part]
    bins = _best_fit([unit.num_tokens for unit in units], max_tokens)
    if not bins:
        return []
    tokens = np.concatenate([sample.tokens for sample in samples], dtype=np.int64)
    offsets = np.cumsum([0] + [len(sample.tokens) for sample in samples])
    found = [_lay_out(tokens, offsets, [units[index] for index in indices]) for indices in bins]
    return sorted(found, key=lambda microbatch: -len(microbatch.tokens))


def _groups(samples: Sequence[Sample], share_prefixes: bool) -> list[list[_Piece]]:
    groups: dict[object, list[_Piece]] = {}
    for index, sample in enumerate(samples):
        loss_positions = np.flatnonzero(sample.loss_mask)
        if not len(loss_positions):
            continue
        split, end = int(loss_positions[0]), int(loss_positions[-1])  # the token at `end` is predicted, not computed
        if split == 0:
            raise ValueError(f"sample {index}: its first token carries loss, but no token before it predicts it")
        key = (sample.prompt_id, sample.tokens[:split].tobytes()) if share_prefixes else index
        groups.setdefault(key, []).append(_Piece(index, split, end, loss_positions))
    return list(groups.values())


def _split(group: list[_Piece], max_tokens: int) -> list[_Unit]:
    """The group whole if it fits, else in as few parts as may be, each of which computes the prefix again."""
    whole = _Unit(group)
    if whole.num_tokens <= max_tokens:
        return [whole]
    parts = _best_fit([piece.num_own for piece in group], max_tokens - group[0].split)
    return [_Unit([group[index] for index in indices]) for indices in parts]


def _share(units: Sequence[_Unit], num_parts: int) -> list[list[_Unit]]:
    """Largest first, each to the part with the fewest tokens (Graham 1969: at most 4/3 of what the fullest part must have)."""
    parts: list[list[_Unit]] = [[] for _ in range(num_parts)]
    loads = [0] * num_parts
    for unit in sorted(units, key=lambda unit: -unit.num_tokens):
        place = loads.index(min(loads))
        parts[place].append(unit)
        loads[place] += unit.num_tokens
    return parts


def _best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of the sizes in bins: largest first, each into the fullest bin that has room; what fits none gets its own."""
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, bin), sorted
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        place = bisect_left(rooms, (sizes[index], 0))
        if place < len(rooms):
            room, bin_index = rooms.pop(place)
        else:
            room, bin_index = capacity, len(bins)
            bins.append([])
        bins[bin_index].append(index)
        insort(rooms, (room - sizes[index], bin_index))
    return bins


def _lay_out(tokens: IndexArray, offsets: IndexArray, units: Sequence[_Unit]) -> Microbatch:
    """`tokens` are those of all samples, and each sample's begin at its offset."""
    # Sample, its first token and its last + 1, prefix, start in the row.
    segments: list[tuple[int, int, int, int, int]] = []
    # Where in the row its prefix starts, and its own tokens.
    pieces: list[tuple[_Piece, int, int]] = []
    num_tokens = 0

    def append(sample: int, begin: int, end: int, prefix: int) -> int:
        nonlocal num_tokens
        segments.append((sample, begin, end, prefix, num_tokens))
        num_tokens += end - begin
        return num_tokens - (end - begin)

    for unit in units:
        first = unit.pieces[0]
        alone = len(unit.pieces) == 1
        prefix = len(segments)
        prefix_start = append(first.index, 0, first.end if alone else first.split, -1)
        for piece in unit.pieces:
            own_start = prefix_start + piece.split
            if not alone and piece.num_own:
                own_start = append(piece.index, piece.split, piece.end, prefix)
            pieces.append((piece, prefix_start, own_start))

    index, begins, segment_ends, prefixes, starts = np.array(segments).T
    lengths = segment_ends - begins
    positions = np.arange(num_tokens) + np.repeat(begins - starts, lengths)

    pieces.sort(key=lambda each: each[0].index)
    predicting = np.concatenate([piece.loss_positions for piece, _, _ in pieces]) - 1
    table = [(piece.split, prefix_start, own_start, offsets[piece.index]) for piece, prefix_start, own_start in pieces]
    counts = [len(piece.loss_positions) for piece, _, _ in pieces]
    split, prefix_start_of, own_start_of, offset = np.repeat(np.array(table), counts, axis=0).T
    is_shared = predicting < split  # the last token of the prefix
    loss_index = offset + predicting + 1
    return Microbatch(
        tokens=tokens[np.repeat(offsets[index], lengths) + positions],
        positions=positions,
        segment_starts=starts,
        segment_lengths=lengths,
        segment_prefixes=prefixes,
        hidden_index=predicting + np.where(is_shared, prefix_start_of, own_start_of - split),
        targets=tokens[loss_index],
        loss_index=loss_index,
    )
