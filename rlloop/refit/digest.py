"""The digest that proves that what the engine holds is what the trainer sent."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

PIECE = 1 << 15  # words; on a CPU their weights stay in cache
ODD = -7046029254386353131  # 2**64 / golden ratio, as a signed word: spreads neighbouring places over all bits


def digest(flat: torch.Tensor, manifest: Sequence[Any]) -> str:
    """Of a flat tensor and the names and shapes that it consists of.

    Names and shapes by sha256; the bits by a sum, modulo 2^64, of words times weights that depend on their place. The sum is
    exact and one pass at memory speed. It guards against wrong, missing or swapped weights, not against malice.
    """
    payload = flat.view(torch.uint8)
    if padding := -len(payload) % 8:
        payload = torch.cat([payload, payload.new_zeros(padding)])
    words = payload.view(torch.int64)
    weights = torch.arange(min(PIECE, len(words)), device=flat.device) * ODD | 1
    total = 0
    for part in _piece_sums(words, weights):
        total = total * ODD + part  # pieces are told apart by the power of ODD
    names = _names(tuple((name, tuple(shape)) for name, shape in manifest))
    return f"{names}-{total % 2**64:016x}"


@lru_cache(maxsize=8)
def _names(manifest: tuple[tuple[str, tuple[int, ...]], ...]) -> str:
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()[:16]


def _piece_sums(words: torch.Tensor, weights: torch.Tensor) -> list[int]:
    """Weighted sum of each PIECE of words. Integer products and sums wrap around, so their order does not matter."""
    if not words.is_cuda:
        return [int(piece.dot(weights[: len(piece)])) for piece in words.split(PIECE)]
    whole = len(words) // PIECE * PIECE
    sums: list[int] = (words[:whole].view(-1, len(weights)) * weights).sum(1).tolist() if whole else []
    rest = words[whole:]
    return [*sums, int((rest * weights[: len(rest)]).sum())] if len(rest) else sums
