"""vLLM on a tiny model in float32, and the same model in transformers + peft."""

from __future__ import annotations

import itertools
import os
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import anyio
import numpy as np
import pytest
import torch
from anyio.from_thread import BlockingPortal, start_blocking_portal

from rlloop.config import EngineSettings
from rlloop.engine.vllm import VllmEngine, start_vllm
from rlloop.errors import RefitError
from rlloop.processes import guard, shared_memory_prefix
from rlloop.refit.transports import make_writer
from rlloop.types import AdapterTicket, Completion, GenerationRequest, InFlight, LoraConfig, Transport

NUM_VERSIONS = 4
RANK, ALPHA = 4, 8
PROMPT = tuple(range(100, 140))
T = TypeVar("T")
Weights = dict[str, torch.Tensor]


class Reference:
    """The same model in transformers + peft."""

    def __init__(self, model: Path) -> None:
        import peft
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        self._model = peft.get_peft_model(base, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))
        self._parameters = {
            name.replace(".default.weight", ".weight"): parameter
            for name, parameter in self._model.named_parameters()
            if "lora_" in name
        }

    def random_weights(self, seed: int) -> Weights:
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.randn(p.shape, generator=generator) * 0.1 for name, p in self._parameters.items()}

    def logprobs(self, weights: Weights, prompt: tuple[int, ...], completion: Completion) -> np.ndarray:
        """Of the completion's tokens, [T]."""
        return self.logprobs_of_a_hop([weights], [0], prompt, completion)

    @torch.no_grad()
    def logprobs_of_a_hop(
        self, weights: list[Weights], starts: list[int], prompt: tuple[int, ...], completion: Completion
    ) -> np.ndarray:
        """[T], where weights i sampled from token starts[i] on, over the keys and values that those before left."""
        tokens = torch.tensor([[*prompt, *completion.tokens.tolist()]])
        # The pass that samples a token reads all before it that no earlier pass has read.
        first_read = [0, *(len(prompt) + start - 1 for start in starts[1:]), tokens.shape[1]]
        cache, logits = None, []
        for some, first, end in zip(weights, first_read, first_read[1:], strict=False):
            for name, parameter in self._parameters.items():
                parameter.copy_(some[name])
            output = self._model(tokens[:, first:end], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits[0])
        every = torch.cat(logits)[:-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
        return every[len(prompt) - 1 :].numpy()


@dataclass
class Harness:
    engine: VllmEngine
    portal: BlockingPortal
    reference: Reference
    folder: Path
    segment: str
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def do(self, function: Callable[[], Awaitable[T]]) -> T:
        """Run on the engine's event loop."""
        return self.portal.call(function)

    def new_version(self) -> tuple[int, Weights]:
        number = next(self._numbers)
        return number, self.reference.random_weights(number)

    def write(self, weights: Weights, transport: Transport = "memory") -> AdapterTicket:
        name = f"{self.segment}{uuid.uuid4().hex[:8]}"
        writer = make_writer(transport, "float32", name, self.folder / name)
        return writer.write(weights, ALPHA / RANK)

    def publish(self, transport: Transport = "memory") -> tuple[int, Weights]:
        version, weights = self.new_version()
        self.publish_as(version, weights, transport)
        return version, weights

    def publish_as(self, version: int, weights: Weights, transport: Transport = "memory") -> None:
        self.do(lambda: self.engine.publish(version, self.write(weights, transport)))

    def generate(self, version: int, **changes: Any) -> list[Completion]:
        request = GenerationRequest(tokens=PROMPT, policy_version=version, max_tokens=16, seed=7)
        return self.do(lambda: self.engine.generate(replace(request, **changes)))

    async def wait_for_tokens(self, number: int) -> None:
        """Until the engine has sampled so many since it started."""
        while self.engine.statistics().num_generated_tokens < number:  # noqa: ASYNC110 - nothing else tells
            await anyio.sleep(0.002)

    def assert_a_version_is_immutable(self) -> None:
        version, weights = self.publish()
        _, others = self.new_version()
        with pytest.raises(RefitError, match="loaded already"):
            self.publish_as(version, others)
        self.assert_sampled_by(weights, self.generate(version))

    def retire_all(self) -> None:
        """Whatever a test did, the engine must be alive after it."""
        version, weights = self.publish()
        self.assert_sampled_by(weights, self.generate(version))
        for loaded in list(self.engine._versions):
            self.do(lambda loaded=loaded: self.engine.retire(loaded))  # type: ignore[misc]

    def assert_sampled_by(self, weights: Weights, completions: list[Completion]) -> None:
        for completion in completions:
            found = self.reference.logprobs(weights, PROMPT, completion)
            np.testing.assert_allclose(found, completion.logprobs, atol=1e-4)


def sample_across_a_publish(
    harness: Harness, in_flight: InFlight, *, num: int, max_tokens: int = 400
) -> tuple[tuple[int, Weights], tuple[int, Weights], list[Completion]]:
    """The old version, the new one, and what requests made of both; the new one samples beside them, by itself."""
    old, old_weights = harness.publish()
    new, new_weights = harness.new_version()
    ticket = harness.write(new_weights)
    request = GenerationRequest(PROMPT, old, max_tokens=max_tokens, in_flight=in_flight)
    found: list[Completion] = []

    async def run() -> None:
        async with anyio.create_task_group() as tasks:

            async def fly(seed: int) -> None:
                found.extend(await harness.engine.generate(replace(request, seed=seed)))

            before = harness.engine.statistics().num_generated_tokens
            for seed in range(num):
                tasks.start_soon(fly, seed)
            await harness.wait_for_tokens(before + 10 * num)
            harness.engine.reset_longest_gap()
            await harness.engine.publish(new, ticket)
            assert not found, "the requests ended before the publish did"
            later = await harness.engine.generate(replace(request, policy_version=new, max_tokens=8))
            harness.assert_sampled_by(new_weights, later)

    harness.do(run)
    assert len(found) == num
    return (old, old_weights), (new, new_weights), found


@contextmanager
def open_harness(model: Path, folder: Path, **arguments: Any) -> Iterator[Harness]:
    """`arguments` are more of `start_vllm`'s."""
    environment = dict(os.environ)
    settings = EngineSettings(max_model_len=512, max_num_seqs=32)
    try:
        with guard() as marker, start_blocking_portal("asyncio") as portal:
            vllm = start_vllm(
                str(model),
                settings,
                dtype="float32",
                lora=LoraConfig(rank=RANK),
                num_versions=NUM_VERSIONS,
                log_path=folder / "engine.log",
                **arguments,
            )
            with portal.wrap_async_context_manager(vllm) as engine:
                prefix = shared_memory_prefix(marker)
                yield Harness(engine, portal, Reference(model), folder, prefix)
    finally:
        os.environ.clear()
        os.environ.update(environment)
        for segment in Path("/dev/shm").glob(f"{prefix}*"):
            segment.unlink()
