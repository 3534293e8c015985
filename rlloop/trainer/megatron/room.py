"""Filling a microbatch up to a size, as CUDA graphs and sequence parallelism want it. Pure index arithmetic.

Shapes: T tokens, S segments, U keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlloop.batching import Microbatch
from rlloop.trainer.flash import count_keys, ends

_STEP = 0.75
"""A room's tokens to those of the next larger: a microbatch fills that much of its room at least, but of the smallest."""
_SMALLEST = 256
"""Tokens that take less time to compute than their kernels would take to launch, for any model that wants graphs."""


def fitting_size(num_tokens: int, largest: int) -> int | None:
    """The smallest size of a room for that many tokens, of `largest` and what follows from it; None when none fits."""
    if num_tokens > largest:
        return None
    size = largest
    while (smaller := int(size * _STEP)) >= max(num_tokens, _SMALLEST):
        size = smaller
    return size


@dataclass(frozen=True, slots=True)
class Room:
    """What fits into a graph's buffers."""

    num_tokens: int
    num_segments: int
    num_keys: int
    """0: no segment has a prefix, so keys need not be gathered."""
    longest: int

    def grown(self, needed: Room) -> Room:
        """Room for both; what has to grow does so to a power of two."""
        pairs = (
            (self.num_segments, needed.num_segments),
            (self.num_keys, needed.num_keys),
            (self.longest, needed.longest),
        )
        sizes = (have if want <= have else 1 << (want - 1).bit_length() for have, want in pairs)
        return Room(self.num_tokens, *sizes)


def needed_room(microbatch: Microbatch, num_tokens: int) -> Room:
    """The room that a microbatch takes once it is filled up."""
    num_keys = count_keys(microbatch)
    missing = num_tokens - len(microbatch.tokens)
    longest = int(num_keys.max())
    return Room(
        num_tokens=num_tokens,
        num_segments=len(num_keys) + -(-missing // longest),
        num_keys=int(num_keys.sum()) + missing if (microbatch.segment_prefixes >= 0).any() else 0,
        longest=longest,
    )


def fill(microbatch: Microbatch, room: Room) -> Microbatch:
    """Segments of tokens that nothing reads, then empty ones."""
    num_tokens = len(microbatch.tokens)
    missing = room.num_tokens - num_tokens
    longest = int(count_keys(microbatch).max())
    lengths = [longest] * (missing // longest) + ([missing % longest] if missing % longest else [])
    lengths += [0] * (room.num_segments - len(microbatch.segment_lengths) - len(lengths))
    return replace(
        microbatch,
        tokens=padded(microbatch.tokens, room.num_tokens),
        positions=padded(microbatch.positions, room.num_tokens),
        segment_starts=np.concatenate([microbatch.segment_starts, num_tokens + ends(lengths)[:-1]]),
        segment_lengths=np.concatenate([microbatch.segment_lengths, np.array(lengths, dtype=np.int64)]),
        segment_prefixes=np.concatenate([microbatch.segment_prefixes, np.full(len(lengths), -1)]),
    )


def padded(array: NDArray[Any], size: int) -> NDArray[Any]:
    """With zeros at the end."""
    return np.pad(array, (0, size - len(array)))
