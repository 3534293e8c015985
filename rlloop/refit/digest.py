"""The digest that proves that what the engine holds is what the trainer sent."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch

ODD = -7046029254386353131  # 2**64 / golden ratio, as a signed word: spreads neighbouring places over all bits


def digest(flat: torch.Tensor, manifest: Sequence[Any]) -> str:
    """Of a flat tensor and the names and shapes that it consists of.

    Names and shapes by sha256; the bits by a 64-bit sum of words times odd weights that depend on their place. The sum is
    exact, the same on every device, and one pass at memory speed. It guards against wrong, missing or swapped weights,
    not against malice.
    """
    payload = flat.view(torch.uint8)
    if padding := -len(payload) % 8:
        payload = torch.cat([payload, payload.new_zeros(padding)])
    words = payload.view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    step = 1 << (24 if flat.is_cuda else 15)  # on a CPU, temporaries of 2**15 words stay in cache and on one thread
    places = torch.arange(min(step, len(words)), device=flat.device) * ODD
    for start in range(0, len(words), step):
        piece = words[start : start + step]
        shift = start * ODD % 2**64  # the places of this piece, as signed words
        total += (piece * (places[: len(piece)] + (shift - 2**64 if shift >= 2**63 else shift) | 1)).sum()
    names = hashlib.sha256(json.dumps([[name, list(shape)] for name, shape in manifest]).encode()).hexdigest()[:16]
    return f"{names}-{total.item() % 2**64:016x}"
