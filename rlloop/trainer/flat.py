"""Samples on their way to a rank process, as a few large arrays: many small ones take longer than a small model's step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from rlloop.types import Sample

_ARRAYS = tuple(field.name for field in fields(Sample) if field.name != "prompt_id")


class Flat:
    """Arrives as a list of the samples."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples

    def __reduce__(self) -> tuple[Callable[..., list[Sample]], tuple[Any, ...]]:
        if not self._samples:
            return list, ()
        columns = {name: _join([getattr(sample, name) for sample in self._samples]) for name in _ARRAYS}
        ends = np.cumsum([len(sample.tokens) for sample in self._samples])
        return _restore, ([sample.prompt_id for sample in self._samples], ends, columns)


def _join(arrays: list[Any]) -> Any:
    """Optional arrays may be missing, of some samples too."""
    return arrays if any(array is None for array in arrays) else np.concatenate(arrays)


def _restore(prompt_ids: list[int], ends: np.ndarray, columns: dict[str, Any]) -> list[Sample]:
    split = {
        name: column if isinstance(column, list) else np.split(column, ends[:-1]) for name, column in columns.items()
    }
    return [
        Sample(prompt_id=prompt_id, **{name: arrays[index] for name, arrays in split.items()})
        for index, prompt_id in enumerate(prompt_ids)
    ]
