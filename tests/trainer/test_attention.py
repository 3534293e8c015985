"""Packed rows with shared prefixes against transformers' own forward of each sample alone."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rlloop.batching import pack
from rlloop.errors import TrainerError
from rlloop.trainer import attention
from rlloop.trainer.attention import IMPLEMENTATION, PackedLayout, packed_attention
from rlloop.types import Sample

MakeSamples = Callable[..., list[Sample]]


def with_lora(folder: str, implementation: str) -> nn.Module:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation, dtype=torch.float32)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)  # B is random, too
    return get_peft_model(model, lora).eval()


def alone(model: nn.Module, samples: list[Sample]) -> Tensor:
    """Logprobs of all loss tokens, one forward pass per sample."""
    parts = []
    for sample in samples:
        tokens = torch.from_numpy(sample.tokens).long()
        logprobs = model(input_ids=tokens[None]).logits[0].log_softmax(-1)
        taken = logprobs[:-1].gather(1, tokens[1:, None])[:, 0]
        parts.append(taken[torch.from_numpy(sample.loss_mask[1:])])
    return torch.cat(parts)


def packed(model: nn.Module, samples: list[Sample], max_tokens: int, share: bool) -> Tensor:
    parts, places = [], []
    for microbatch in pack(samples, max_tokens, share_prefixes=share):
        layout = PackedLayout(microbatch, device=torch.device("cpu"), dtype=torch.float32)
        logits = model(
            input_ids=torch.from_numpy(microbatch.tokens)[None],
            position_ids=torch.from_numpy(microbatch.positions)[None],
            use_cache=False,
            packed_layout=layout,
        ).logits[0]
        logprobs = logits[torch.from_numpy(microbatch.hidden_index)].log_softmax(-1)
        parts.append(logprobs.gather(1, torch.from_numpy(microbatch.targets)[:, None])[:, 0])
        places.append(microbatch.loss_index)
    return torch.cat(parts)[torch.from_numpy(np.argsort(np.concatenate(places)))]


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("longest_plain", [512, 0], ids=["plain", "sdpa"])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("max_tokens", [1000, 40])
def test_equals_each_sample_alone(
    models: dict[str, str],
    make_samples: MakeSamples,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    longest_plain: int,
    share: bool,
    max_tokens: int,
) -> None:
    monkeypatch.setattr(attention, "_LONGEST_PLAIN", longest_plain)
    samples = make_samples()
    results = []
    for implementation in ("eager", IMPLEMENTATION):
        model = with_lora(models[name], implementation)
        logprobs = alone(model, samples) if implementation == "eager" else packed(model, samples, max_tokens, share)
        weights = torch.linspace(-1, 1, len(logprobs))
        (logprobs * weights).sum().backward()
        results.append((logprobs.detach(), [p.grad for p in model.parameters() if p.requires_grad]))
    (expected, expected_gradients), (logprobs, gradients) = results
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, atol=1e-5 * float(wanted.abs().max().clamp(min=1)), rtol=1e-4)


def test_lengths_that_differ_much_are_padded_to_less_than_twice(make_samples: MakeSamples) -> None:
    samples = make_samples(num_groups=6, group_size=8)
    (microbatch,) = pack(samples, 10_000)
    layout = PackedLayout(microbatch, device=torch.device("cpu"), dtype=torch.float32)
    assert len(layout.tokens) < 2 * len(microbatch.tokens)
    assert len(layout.rows) <= 10


def test_attention_that_is_more_than_causal_is_refused(make_samples: MakeSamples) -> None:
    (microbatch,) = pack(make_samples(), 10_000)
    layout = PackedLayout(microbatch, device=torch.device("cpu"), dtype=torch.float32)
    some = torch.zeros(1, 2, len(microbatch.tokens), 8)

    def call(**features: object) -> None:
        packed_attention(nn.Linear(1, 1), some, some, some, None, packed_layout=layout, **features)

    with pytest.raises(TrainerError, match="softcap"):
        call(softcap=30.0)
    with pytest.raises(TrainerError, match="sliding window of 4 tokens"):
        call(sliding_window=4)
    call(sliding_window=100_000)
