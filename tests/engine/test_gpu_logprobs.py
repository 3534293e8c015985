"""Logprobs of sampled tokens: vLLM's kernel, launched with larger blocks and without ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlloop.engine import gpu_logprobs

pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore")]  # of vLLM


@pytest.fixture
def logprob(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's module, with its own kernels again afterwards."""
    from vllm.v1.worker.gpu.sample import logprob

    for name in ("_topk_log_softmax_kernel", "_ranks_kernel"):
        monkeypatch.setattr(logprob, name, getattr(logprob, name))
    return logprob


class FakeKernel:
    """Remembers with what it was launched."""

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[int, ...], tuple[Any, ...], dict[str, int]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: self.launches.append((grid, arguments, options))


def test_only_the_options_differ_and_ranks_are_not_counted(logprob: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = {}
    logits, sampled = torch.zeros(3, 10), torch.tensor([4, 0, 9])
    monkeypatch.setattr(logprob.triton, "next_power_of_2", lambda number: number, raising=False)
    for installs in (False, True):
        kernel, ranks = FakeKernel(), FakeKernel()
        logprob._topk_log_softmax_kernel, logprob._ranks_kernel = kernel, ranks
        if installs:
            gpu_logprobs.install()
        found = logprob.compute_topk_scores(logits, 0, sampled)
        ((grid, arguments, launched[installs]),) = kernel.launches
        assert grid == (3,)
        assert arguments[0] is found.logprobs
        assert arguments[1] is logits
        assert len(ranks.launches) == (not installs)
    assert launched[True] == {**launched[False], "BLOCK_SIZE": 16384, "num_warps": 16}
    assert launched[False]["BLOCK_SIZE"] == 1024


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocabulary", [1000, 16384, 49152, 151936])
def test_they_are_log_softmax(logprob: Any, vocabulary: int, dtype: torch.dtype) -> None:
    gpu_logprobs.install()
    random = torch.Generator("cuda").manual_seed(0)
    # Rows of a wider tensor, as where the vocabulary is padded; what is beside them must not count.
    wide = 4 * torch.randn(64, vocabulary + 64, device="cuda", generator=random)
    wide[:, vocabulary:] = 100
    logits = wide.to(dtype)[:, :vocabulary]
    sampled = torch.randint(vocabulary, (64,), device="cuda", generator=random)
    sampled[0] = vocabulary - 1
    expected = logits.double().log_softmax(-1).gather(-1, sampled[:, None])
    found = logprob.compute_topk_scores(logits, 0, sampled)
    torch.testing.assert_close(found.logprobs.double(), expected, atol=2e-5, rtol=0)
    assert found.logprob_token_ids[:, 0].tolist() == sampled.tolist()
