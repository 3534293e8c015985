"""vLLM with two tensor-parallel ranks, each of which holds a part of every adapter."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from vllm_harness import ALPHA, PROMPT, RANK, Harness, open_harness

from rlloop.errors import RefitError
from rlloop.refit.transports import make_writer

pytestmark = [pytest.mark.real, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def shared(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    cores = frozenset(os.sched_getaffinity(0))
    with open_harness(tiny_llama, tmp_path_factory.mktemp("engine"), cores=cores, tensor_parallel=2) as harness:
        yield harness


@pytest.fixture
def harness(shared: Harness) -> Iterator[Harness]:
    """With no version loaded."""
    yield shared
    shared.retire_all()


def test_a_version_samples_with_its_own_weights(harness: Harness) -> None:
    """Two query heads are shared out, the one of keys and values is on both ranks; o_proj and down_proj are cut the other way."""
    old, old_weights = harness.publish()
    new, new_weights = harness.publish()
    for version, weights, other in ((old, old_weights, new_weights), (new, new_weights, old_weights)):
        [completion] = harness.generate(version)
        harness.assert_sampled_by(weights, [completion])
        difference = harness.reference.logprobs(other, PROMPT, completion) - completion.logprobs
        assert np.abs(difference).max() > 0.05, "the versions are too alike for this test to fail"


@pytest.mark.parametrize(("layer", "half"), [("q_proj", "B"), ("down_proj", "A"), ("o_proj", "B")])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_tensor_of_another_size_is_refused_and_no_rank_keeps_it(
    harness: Harness, layer: str, half: str, change: int
) -> None:
    """vLLM would cut each rank's part out of it."""
    version, weights = harness.new_version()
    name = next(name for name in weights if f"{layer}.lora_{half}" in name)
    right = weights[name] if half == "B" else weights[name].T
    wrong = right.repeat(2, 1)[: len(right) + change]
    renewed = weights | {name: (wrong if half == "B" else wrong.T).contiguous()}
    with pytest.raises(RefitError, match=layer):
        harness.do(lambda: harness.engine.publish(version, harness.write(renewed)))
    harness.do(lambda: harness.engine.publish(version, harness.write(weights)))  # its number and slots are free on both
    harness.assert_sampled_by(weights, harness.generate(version))


def test_corrupted_bytes_are_refused(harness: Harness) -> None:
    version, weights = harness.new_version()
    ticket = make_writer("memory", "float32", f"{harness.segment}corrupted").write(weights, ALPHA / RANK)
    with open(ticket.location, "r+b") as file:
        first = file.read(1)
        file.seek(0)
        file.write(bytes([first[0] ^ 1]))
    with pytest.raises(RefitError, match=r"rank 0 .* already as they arrived"):
        harness.do(lambda: harness.engine.publish(version, ticket))
    harness.do(lambda: harness.engine.publish(version, harness.write(weights)))
