"""The digest that proves that what the engine holds is what the trainer sent."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache

import torch

from rlloop.types import Manifest

PIECE = 1 << 15  # words; on a CPU their weights stay in cache
ODD = -7046029254386353131  # 2**64 / golden ratio, as a signed word: spreads neighbouring places over all bits


def digest(flat: torch.Tensor, manifest: Manifest) -> str:
    """Of a flat tensor and the names and shapes that it consists of.

    Names and shapes by sha256; the bits by a sum, modulo 2^64, of words times weights that depend on their place. The sum is
    exact and one pass at memory speed. It guards against wrong, missing or swapped weights, not against malice.
    """
    return spelled(checksum(flat), manifest)


def spelled(total: torch.Tensor, manifest: Manifest) -> str:
    """The digest, from the checksum of the flat tensor."""
    names = _names(tuple((name, tuple(shape)) for name, shape in manifest))
    return f"{names}-{int(total) % 2**64:016x}"


def checksum(flat: torch.Tensor) -> torch.Tensor:
    """A signed word, on the tensor's device. Integer products and sums wrap around, so their order does not matter."""
    payload = flat.view(torch.uint8)
    if padding := -len(payload) % 8:
        payload = torch.cat([payload, payload.new_zeros(padding)])
    words = payload.view(torch.int64)
    weights = torch.arange(min(PIECE, len(words)), device=flat.device) * ODD | 1
    sums = _piece_sums(words, weights)
    # Pieces are told apart by the power of ODD, of which the last has none.
    powers = torch.cat([torch.ones_like(sums[:1]), torch.full_like(sums[1:], ODD)]).cumprod(0)
    return (sums * powers.flip(0)).sum()


@lru_cache(maxsize=8)
def _names(manifest: tuple[tuple[str, tuple[int, ...]], ...]) -> str:
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()[:16]


def _piece_sums(words: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sum of each PIECE of words."""
    if not words.is_cuda:
        return torch.stack([piece.dot(weights[: len(piece)]) for piece in words.split(PIECE)])
    whole = len(words) // PIECE * PIECE
    rows, rest = words[:whole].view(-1, len(weights)), words[whole:]
    # By 16 MB: the products of all would be as large as they are.
    sums = [(some * weights).sum(1) for some in rows.split(64)]
    return torch.cat([*sums, (rest * weights[: len(rest)]).sum(0, keepdim=True)] if len(rest) else sums)
