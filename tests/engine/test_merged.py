"""An engine whose weights have the newest version merged into them; and vLLM's layers, as they are written to on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from vllm_harness import PROMPT, Harness, open_harness, sample_across_a_publish

from rlloop.errors import EngineError, RefitError
from rlloop.refit.merged import InPlace, lora_layers

pytestmark = [pytest.mark.real, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def harness(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    core = frozenset({min(os.sched_getaffinity(0))})
    with open_harness(tiny_llama, tmp_path_factory.mktemp("engine"), cores=core, form="merged") as harness:
        yield harness


def test_the_newest_version_samples_and_takes_the_place_of_the_one_before(harness: Harness) -> None:
    old, old_weights = harness.publish()
    harness.assert_sampled_by(old_weights, harness.generate(old))
    new, new_weights = harness.publish()
    [completion] = harness.generate(new)  # of a prompt that is in the prefix cache
    harness.assert_sampled_by(new_weights, [completion])
    difference = harness.reference.logprobs(old_weights, PROMPT, completion) - completion.logprobs
    assert np.abs(difference).max() > 0.05, "the versions are too alike for this test to fail"
    with pytest.raises(EngineError, match=rf"{old} is not loaded; the engine serves \[{new}\]"):
        harness.generate(old)


def test_a_zero_adapter_is_the_base_model_to_the_bit(harness: Harness) -> None:
    _, weights = harness.new_version()
    nothing = {name: torch.zeros_like(tensor) if ".lora_B." in name else tensor for name, tensor in weights.items()}
    found = []
    for sent in (nothing, weights, nothing):
        version, _ = harness.new_version()
        harness.publish_as(version, sent)
        found += harness.generate(version)
    assert found[0].logprobs.tobytes() == found[2].logprobs.tobytes() != found[1].logprobs.tobytes()


def test_some_modules_alone(harness: Harness) -> None:
    """Query and not key and value, which vLLM has in one weight."""
    version, weights = harness.new_version()
    harness.publish_as(version, {name: w for name, w in weights.items() if "q_proj" in name})
    others = {name: w if "q_proj" in name else torch.zeros_like(w) for name, w in weights.items()}
    harness.assert_sampled_by(others, harness.generate(version))


def test_a_version_is_immutable(harness: Harness) -> None:
    harness.assert_a_version_is_immutable()


def test_requests_in_flight_hop(harness: Harness) -> None:
    (old, old_weights), (new, new_weights), found = sample_across_a_publish(harness, "hop", num=3)
    for completion in found:
        versions = completion.versions
        cut = int((versions == old).sum())
        assert versions.tolist() == [old] * cut + [new] * (400 - cut)
        assert 0 < cut < 400
        own = harness.reference.logprobs_of_a_hop([old_weights, new_weights], [0, cut], PROMPT, completion)
        np.testing.assert_allclose(own, completion.logprobs, atol=1e-4)


def test_requests_in_flight_restart(harness: Harness) -> None:
    """A token or two are sampled by the new version before vLLM hears of the abort."""
    (old, old_weights), (new, new_weights), found = sample_across_a_publish(harness, "restart", num=3)
    for completion in found:
        versions = completion.versions
        cut = int((versions == old).sum())
        assert versions.tolist() == [old] * cut + [new] * (400 - cut)
        own = harness.reference.logprobs(old_weights, PROMPT, completion)
        np.testing.assert_allclose(own[:cut], completion.logprobs[:cut], atol=1e-4)
        prefilled = harness.reference.logprobs(new_weights, PROMPT, completion)
        np.testing.assert_allclose(prefilled[-200:], completion.logprobs[-200:], atol=1e-4)


@pytest.mark.parametrize("wrong", ["corrupted", "a name", "a half", "a size"])
def test_what_does_not_fit_is_refused_and_the_version_before_is_served(harness: Harness, wrong: str) -> None:
    version, weights = harness.publish()
    bad, changed = harness.new_version()
    name = next(name for name in changed if "layers.1.mlp.up_proj.lora_B" in name)
    tensor = changed.pop(name)
    match wrong:
        case "corrupted":
            changed[name] = tensor
        case "a name":
            changed[name.replace("layers.1", "layers.7")] = tensor
        case "a size":
            changed[name] = tensor[:-1].contiguous()
    ticket = harness.write(changed)
    if wrong == "corrupted":
        with open(ticket.location, "r+b") as file:
            file.write(b"?")
    with pytest.raises(RefitError, match="rank 0" if wrong == "corrupted" else r"up_proj"):
        harness.do(lambda: harness.engine.publish(bad, ticket))
    harness.assert_sampled_by(weights, harness.generate(version))


HIDDEN, HEADS, KEY_VALUE_HEADS, HEAD_SIZE, FEATURES = 24, 4, 2, 8, 40
SIZES = {  # out, in
    "self_attn.q_proj": (HEADS * HEAD_SIZE, HIDDEN),
    "self_attn.k_proj": (KEY_VALUE_HEADS * HEAD_SIZE, HIDDEN),
    "self_attn.v_proj": (KEY_VALUE_HEADS * HEAD_SIZE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD_SIZE),
    "mlp.gate_proj": (FEATURES, HIDDEN),
    "mlp.up_proj": (FEATURES, HIDDEN),
    "mlp.down_proj": (HIDDEN, FEATURES),
}


FUSED = {
    "self_attn.qkv_proj": ((HEADS + 2 * KEY_VALUE_HEADS) * HEAD_SIZE, HIDDEN),
    "mlp.gate_up_proj": (2 * FEATURES, HIDDEN),
    "self_attn.o_proj": SIZES["self_attn.o_proj"],
    "mlp.down_proj": SIZES["mlp.down_proj"],
}
PREFIX = "base_model.model."


class Layer(nn.Module):
    """vLLM's layers with the weights of one tensor-parallel rank, under the names that they have in a model."""

    config = None

    def __init__(self, is_fused: bool = False) -> None:
        from vllm.model_executor.layers import linear

        super().__init__()
        parts = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
        self.packed_modules_mapping = {name: [name] for name in parts} if is_fused else parts
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        self.self_attn.qkv_proj = linear.QKVParallelLinear(HIDDEN, HEAD_SIZE, HEADS, KEY_VALUE_HEADS, bias=False)
        self.self_attn.o_proj = linear.RowParallelLinear(HEADS * HEAD_SIZE, HIDDEN, bias=False)
        self.mlp.gate_up_proj = linear.MergedColumnParallelLinear(HIDDEN, [FEATURES] * 2, bias=False)
        self.mlp.down_proj = linear.RowParallelLinear(FEATURES, HIDDEN, bias=False)

    def load(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """With vLLM's own loaders; -> this rank's parts."""
        qkv, gate_up = self.self_attn.qkv_proj, self.mlp.gate_up_proj
        parts = {
            **{f"self_attn.{kind}_proj": (qkv, kind) for kind in "qkv"},
            **{f"mlp.{kind}_proj": (gate_up, index) for index, kind in enumerate(("gate", "up"))},
        }
        for name, weight in weights.items():
            layer, *shard = parts.get(name) or (self.get_submodule(name),)
            layer.weight.weight_loader(layer.weight, weight, *shard)
        return {name: parameter.detach().clone() for name, parameter in self.named_parameters()}


@contextmanager
def layers_of(monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> Iterator[None]:
    """What is made in the block is one tensor-parallel rank's; without the others, for nothing is computed."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    monkeypatch.setattr(parallel_state, "_TP", SimpleNamespace(rank_in_group=rank, world_size=size))
    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.mark.parametrize("is_fused", [False, True], ids=["split in the files", "fused in the files, too"])
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2)])
def test_in_place_each_rank_gets_what_the_loader_would_give_it(
    monkeypatch: pytest.MonkeyPatch, rank: int, size: int, is_fused: bool
) -> None:
    """Of W0 + B A, for adapters that come one after the other in one buffer; with a zero adapter the base to the bit."""
    sizes = FUSED if is_fused else SIZES
    random = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=random) for name, shape in sizes.items()}
    with layers_of(monkeypatch, rank, size):
        layer, expected = Layer(is_fused), Layer(is_fused)
    unchanged = layer.load(base)
    weights = InPlace(layer, lora_layers(layer), torch.float32)
    buffer = torch.empty(sum(4 * sum(shape) for shape in sizes.values()))
    for scale, names in ((1.0, [*sizes]), (0.0, [*sizes]), (2.0, [*sizes]), (1.0, ["mlp.down_proj"])):
        adapter = {
            f"{PREFIX}{name}.lora_{half}.weight": torch.randn(shape, generator=random) * (scale if half == "B" else 1)
            for name in names
            for half, shape in (("A", (4, sizes[name][1])), ("B", (sizes[name][0], 4)))
        }
        manifest = [(name, list(adapter[name].shape)) for name in sorted(adapter)]
        flat = torch.cat([adapter[name].flatten() for name, _ in manifest])
        weights.arrange(manifest)
        weights.write(buffer[: len(flat)].copy_(flat))
        merged = dict(base)
        for name in names:
            a, b = (adapter[f"{PREFIX}{name}.lora_{half}.weight"] for half in "AB")
            merged[name] = base[name] + b @ a
        right = expected.load(merged)
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(parameter.detach(), right[name])
            assert scale or parameter.equal(unchanged[name])
    weights.restore()
    assert all(parameter.equal(unchanged[name]) for name, parameter in layer.named_parameters())


def test_in_place_another_size_or_dtype_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with layers_of(monkeypatch, 0, 1):
        layer = Layer()
    layer.mlp.down_proj.weight.data.normal_()  # vLLM leaves it as the memory was, in which a NaN equals nothing
    name = PREFIX + "mlp.down_proj.lora_{}.weight"
    right = [4, FEATURES], [HIDDEN, 4]
    for a, b, dtype in (
        ([4, FEATURES - 1], right[1], torch.float32),
        (right[0], [HIDDEN + 1, 4], torch.float32),
        (*right, torch.bfloat16),
    ):
        before = layer.mlp.down_proj.weight.clone()
        with pytest.raises(ValueError, match=r"mlp\.down_proj"):
            InPlace(layer, lora_layers(layer), dtype).arrange([(name.format("A"), a), (name.format("B"), b)])
        assert layer.mlp.down_proj.weight.equal(before)
