"""The logprob of each sampled token on a GPU, in a fifth of the time.

vLLM's kernel goes twice through a request's logits, 1,024 at a time and one block after the other; another one counts those that
are as great as the sampled token's, for a rank that nobody here reads. Together that is a twentieth of a small model's step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

OPTIONS = {"BLOCK_SIZE": 16384, "num_warps": 16}
"""Of vLLM's kernel: how many logits it takes at a time, and with how many warps. `benchmarks/logprob_kernel.py` found them."""


def install() -> None:
    """To be called in a worker before all else. Ranks hold whatever was in memory from then on."""
    from vllm.v1.worker.gpu.sample import logprob

    logprob._topk_log_softmax_kernel = _Tuned(logprob._topk_log_softmax_kernel)
    logprob._ranks_kernel = _Skipped()


class _Tuned:
    """In the place of one of Triton's kernels."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        launch = self._kernel[grid]
        return lambda *arguments, **options: launch(*arguments, **{**options, **OPTIONS})


class _Skipped:
    """Likewise."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: None
