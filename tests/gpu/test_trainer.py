"""What only a GPU shows of the megatron trainer: flash attention, and CUDA graphs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from rlloop.batching import pack
from rlloop.config import MegatronSettings, TrainerSettings
from rlloop.trainer.attention import PackedLayout
from rlloop.trainer.flash import FlashLayout
from rlloop.trainer.megatron import MegatronTrainer
from rlloop.trainer.peft import PeftTrainer
from rlloop.trainer.rank_trainer import RankTrainer
from rlloop.types import AdamConfig, LoraConfig, Sample

sys.path.insert(0, str(Path(__file__).parents[1] / "trainer"))  # of the ranks, too
from megatron_ranks import Writer, surrogate

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
CUDA = torch.device("cuda")
ADAPTERS = {"a": LoraConfig(rank=4, alpha=8.0), "b": LoraConfig(rank=16, alpha=16.0, seed=3)}


def make_samples(num_groups: int, group_size: int, seed: int, longest: int = 60) -> list[Sample]:
    generator = np.random.default_rng(seed)
    samples = []
    for group in range(num_groups):
        prompt = generator.integers(2, 500, generator.integers(3, longest))
        for _ in range(group_size):
            tokens = np.concatenate([prompt, generator.integers(2, 500, generator.integers(1, longest))])
            loss_mask = np.arange(len(tokens)) >= len(prompt)
            noise, credit = generator.normal(size=(2, len(tokens)))
            samples.append(
                Sample(
                    tokens=tokens.astype(np.int32),
                    loss_mask=loss_mask,
                    rollout_logprobs=np.where(loss_mask, noise * 0.3 - 6, 0).astype(np.float32),
                    advantages=np.full(len(tokens), credit[0], np.float32),
                    loss_weights=np.full(len(tokens), 1 / 400, np.float32),
                    prompt_id=group,
                )
            )
    return samples


@pytest.mark.parametrize("group_size", [1, 5], ids=["alone", "sharing prompts"])
def test_flash_attention_is_packed_attention(group_size: int) -> None:
    (microbatch,) = pack(make_samples(4, group_size, 0), 10_000)
    inputs = [
        torch.randn(len(microbatch.tokens), heads, 64, device=CUDA, dtype=torch.bfloat16).requires_grad_()
        for heads in (8, 2, 2)
    ]
    gradient = torch.randn_like(inputs[0])
    found, expected = [
        (output, *torch.autograd.grad(output, inputs, gradient))
        for output in (
            FlashLayout.of(microbatch, CUDA).attend(*inputs, 0.125),
            PackedLayout(microbatch, device=CUDA, dtype=torch.bfloat16).attend(*inputs, 0.125),
        )
    ]
    for got, right in zip(found, expected, strict=True):
        torch.testing.assert_close(got, right, atol=6e-2, rtol=6e-2)


COMPILED_ROTATION = """
import sys, torch
from rlloop.trainer.megatron import layer
num_groups, per_group = map(int, sys.argv[1:])
for num_tokens in (432, 64, 96):
    cos, sin = torch.randn(2, num_tokens, 32, device="cuda")
    grouped = torch.randn(num_tokens, num_groups, per_group + 2, 64, device="cuda")
    one, other = (grouped.clone().requires_grad_() for _ in range(2))
    by_autograd = layer.split_and_rotate(one, cos, sin, None, None, 0.0)
    gradients = [torch.randn_like(each) for each in by_autograd]
    torch.autograd.backward(by_autograd, gradients)
    torch.autograd.backward(layer._SplitAndRotate.apply(other, cos, sin), gradients)
    torch.testing.assert_close(one.grad, other.grad)
"""


def test_what_was_compiled_for_one_model_serves_no_other(tmp_path: Path) -> None:
    """Torch's cache on disk once gave one model's backward pass to the next, which has other numbers of heads."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    for heads in (("3", "3"), ("2", "2"), ("3", "2")):
        subprocess.run([sys.executable, "-c", COMPILED_ROTATION, *heads], check=True, env=environment)


def test_graphs_change_nothing(tmp_path: Path) -> None:
    """Over more lengths than Megatron's cache of angles has room for and several sizes, with two adapters that take turns,
    after one that went."""
    save_model(tmp_path)
    found: dict[str, dict[str, tuple[np.ndarray, dict[str, Tensor]]]] = {}

    async def live(kind: str) -> None:
        async with make_trainer(tmp_path, kind) as trainer:
            await trainer.create_adapter("gone", LoraConfig(rank=4))
            await trainer.forward_backward("gone", make_samples(1, 4, 0), surrogate)
            await trainer.remove_adapter("gone")
            for name, lora in ADAPTERS.items():
                await trainer.create_adapter(name, lora)
            for step in range(40):
                name = "ab"[step % 2]
                samples = make_samples(1 + step % 6, 4, step, 20 + step)
                await trainer.forward_backward(name, samples, surrogate)
                await trainer.optim_step(name, AdamConfig(lr=1e-3, eps=1e-4))
                await trainer.logprobs(None, make_samples(1, 1, step, 20 + step))
                if step % 10 > 7:  # from its second turn on an export replays a graph
                    await trainer.export_adapter(name)
            last = make_samples(6, 4, 99)
            exported: Any = {name: await trainer.export_adapter(name) for name in ADAPTERS}
            found[kind] = {
                name: (np.concatenate(await trainer.logprobs(name, last)), exported[name]) for name in ADAPTERS
            }

    for kind in ("on", "off", "peft"):
        anyio.run(live, kind)
    for kind in ("off", "peft"):
        for name, (logprobs, weights) in found["on"].items():
            others, other_weights = found[kind][name]
            assert abs(logprobs - others).mean() < 0.02
            for key, weight in weights.items():
                torch.testing.assert_close(weight, other_weights[key], atol=0.01, rtol=0)


def test_a_graph_that_drops_inputs_serves_training_alone(tmp_path: Path) -> None:
    save_model(tmp_path)
    samples = make_samples(4, 4, 0)

    async def live() -> None:
        async with make_trainer(tmp_path, "on") as trainer:
            await trainer.create_adapter("a", LoraConfig(rank=4, dropout=0.5))
            await trainer.forward_backward("a", samples, surrogate)
            await trainer.optim_step("a", AdamConfig(lr=1e-2, eps=1e-4))
            one, other = [(await trainer.forward_backward("a", samples, surrogate))["loss"] for _ in range(2)]
            assert one != other
            first, second = [np.concatenate(await trainer.logprobs("a", samples)) for _ in range(2)]
            np.testing.assert_array_equal(first, second)

    anyio.run(live)


def save_model(folder: Path) -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.05}
    Qwen2ForCausalLM(Qwen2Config(**shape, **heads)).save_pretrained(folder)


def make_trainer(folder: Path, kind: str) -> RankTrainer:
    """`peft`, or the megatron trainer with CUDA graphs `on` or `off`."""
    make, megatron = (PeftTrainer, {}) if kind == "peft" else (MegatronTrainer, {"cuda_graphs": kind})
    settings = TrainerSettings(
        kind="peft" if kind == "peft" else "megatron",
        max_tokens_per_microbatch=1024,
        megatron=MegatronSettings(**megatron),  # type: ignore[arg-type]
    )
    return make(
        str(folder), dtype="bfloat16", settings=settings, temperature=1.0, writer=Writer(), log_path=folder / kind
    )
