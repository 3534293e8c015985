"""The megatron trainer against the peft trainer and against transformers + PEFT, over real ranks with gloo.

Each layout goes through the whole story (`live`) once, in ranks that all share; the tests read what it found.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import numpy as np
import peft
import pytest
import torch
from numpy.typing import NDArray
from rlloop.algorithms import ppo
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from megatron_ranks import (
    BorrowedRanks,
    ShowingRank,
    SuccessiveRank,
    Writer,
    infinite,
    surrogate,
    with_megatrons_layer,
)
from rlloop.config import MegatronSettings, TrainerSettings
from rlloop.errors import ConfigError, RefitError, TrainerError
from rlloop.events import Events
from rlloop.losses import value_loss
from rlloop.tracking import jsonl
from rlloop.trainer.megatron import MegatronTrainer
from rlloop.trainer.megatron.stages import share_layers
from rlloop.trainer.peft import PeftTrainer
from rlloop.trainer.rank_trainer import RankTrainer
from rlloop.trainer.ranks import Ranks, RankSpec
from rlloop.types import AdamConfig, Group, LoraConfig, Metrics, Prompt, Rollout, Sample

pytestmark = pytest.mark.timeout(300)

LORA = LoraConfig(rank=4, alpha=8.0)
OTHER = LoraConfig(rank=2, alpha=2.0, targets=("q_proj", "down_proj"), seed=5)
DORA = replace(LORA, dora=True), replace(OTHER, dora=True)
OF_ATTENTION = replace(LORA, targets=("q_proj", "k_proj", "v_proj", "o_proj")), replace(OTHER, targets=("o_proj",))
# With the usual eps, a weight whose gradient is rounding noise moves by a whole learning rate.
ADAM = AdamConfig(lr=3e-3, eps=1e-4, weight_decay=0.1, max_grad_norm=0.5)
TEMPERATURE = 0.8
SHAPE: dict[str, Any] = {
    "vocab_size": 98,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
"""Divides by 2 and 4, but for the layers."""
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}
LAYOUTS = {
    "1x1": MegatronSettings(),
    "TP2": MegatronSettings(tensor_parallel=2),
    "PP2": MegatronSettings(pipeline_parallel=2),
    "DP2": MegatronSettings(data_parallel=2),
    "TP2xPP2": MegatronSettings(tensor_parallel=2, pipeline_parallel=2),
    "TP2, sequence parallel": MegatronSettings(tensor_parallel=2, sequence_parallel=True),
    "PP2, interleaved": MegatronSettings(pipeline_parallel=2, virtual_stages=2),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models whose heads and vocabulary divide by 2 and 4; biases and norms are random, too."""
    found = {}
    for name, model_class, config in [
        ("qwen2", Qwen2ForCausalLM, Qwen2Config(**SHAPE, tie_word_embeddings=True)),
        ("qwen3", Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=False)),
        ("experts", Qwen3MoeForCausalLM, Qwen3MoeConfig(**SHAPE, **EXPERTS, head_dim=16, tie_word_embeddings=False)),
    ]:
        torch.manual_seed(0)
        model = model_class(config)
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, mean=float("norm" in parameter_name), std=0.1)
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def samples(make_samples: Callable[..., list[Sample]]) -> list[Sample]:
    return make_samples(num_groups=4)


@dataclass
class Life:
    """What a trainer found on its way."""

    losses: list[float]
    norms: list[float]
    metrics: Metrics
    logprobs: NDArray[np.float32]
    base_logprobs: NDArray[np.float32]
    weights: dict[str, Tensor]
    other_losses: list[float]
    """Of a second adapter, of another rank, on other layers, trained in between."""
    next_loss: float
    """Of the step after what was saved."""
    nonfinite_was_skipped: bool


async def live(
    trainer: RankTrainer,
    samples: list[Sample],
    folder: Path,
    found: list[Life],
    loras: tuple[LoraConfig, LoraConfig] = (LORA, OTHER),
) -> None:
    await trainer.create_adapter("policy", loras[0])
    await trainer.create_adapter("other", loras[1])
    losses, norms, other_losses = [], [], []
    for _ in range(3):
        metrics = await trainer.forward_backward("policy", samples, surrogate)
        other = await trainer.forward_backward("other", samples[:5], surrogate)
        result = await trainer.optim_step("policy", ADAM)
        await trainer.optim_step("other", ADAM)
        losses.append(float(metrics["loss"]))
        norms.append(result.grad_norm)
        other_losses.append(float(other["loss"]))
    logprobs = np.concatenate(await trainer.logprobs("policy", samples))
    base_logprobs = np.concatenate(await trainer.logprobs(None, samples))
    weights: Any = await trainer.export_adapter("policy")
    await trainer.save("policy", folder)
    await trainer.forward_backward("policy", samples, infinite)
    skipped = (await trainer.optim_step("policy", ADAM)).skipped
    await trainer.forward_backward("policy", samples, surrogate)
    await trainer.optim_step("policy", ADAM)
    after = await trainer.forward_backward("policy", samples, surrogate)
    found.append(
        Life(losses, norms, metrics, logprobs, base_logprobs, weights, other_losses, float(after["loss"]), skipped)
    )


RunTrainer = Callable[[RankTrainer, Callable[[], Awaitable[None]]], None]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunTrainer]:
    """(trainer, function) -> calls the function while the trainer is there. Those of a kind share their processes; what
    stands in for CUDA in Megatron's is not for transformers."""
    log_path = tmp_path_factory.mktemp("ranks") / "log"
    cores = [None] if torch.cuda.is_available() else [frozenset({core}) for core in os.sched_getaffinity(0)]
    specs = [RankSpec(SuccessiveRank, cores[i % len(cores)], log_path) for i in range(torch.cuda.device_count() or 4)]
    of_megatron, of_peft = Ranks(specs), Ranks(specs[:1])

    async def call(trainer: RankTrainer, function: Callable[[], Awaitable[None]]) -> None:
        ranks = of_megatron if isinstance(trainer, MegatronTrainer) else of_peft
        trainer._ranks = BorrowedRanks(ranks, trainer._ranks._specs)  # type: ignore[assignment]
        async with trainer:
            await function()

    with (
        anyio.from_thread.start_blocking_portal() as portal,
        portal.wrap_async_context_manager(of_megatron),
        portal.wrap_async_context_manager(of_peft),
    ):
        yield partial(portal.call, call)


Lives = Callable[..., tuple[Life, Path]]


@pytest.fixture(scope="module")
def lives(
    run: RunTrainer, folders: dict[str, Path], samples: list[Sample], tmp_path_factory: pytest.TempPathFactory
) -> Lives:
    """(model, layout, or `peft`) -> what it found, and the folder that it saved."""

    @cache
    def get(model: str, layout: str, dora: bool = False) -> tuple[Life, Path]:
        folder, found = tmp_path_factory.mktemp("saved"), []
        events = Events(folder / "events.jsonl")
        trainer = make_trainer(folders[model], LAYOUTS.get(layout), events=events)
        loras = OF_ATTENTION if model == "experts" else DORA if dora else (LORA, OTHER)
        run(trainer, partial(live, trainer, samples, folder, found, loras))
        events.close()
        return found[0], folder

    return get


class ShowingTrainer(MegatronTrainer):
    """Its ranks also answer what no Trainer is asked."""

    build_rank = ShowingRank


class MegatronsLayerTrainer(MegatronTrainer):
    """With Megatron-Core's own transformer layer."""

    build_rank = staticmethod(with_megatrons_layer)


def make_trainer(
    model: Path,
    layout: MegatronSettings | None,
    megatron: type[MegatronTrainer] = MegatronTrainer,
    *,
    gradient_checkpointing: bool = False,
    **extra: Any,
) -> RankTrainer:
    """Microbatches of 64 tokens, so that there are several."""
    if layout and torch.cuda.is_available() and torch.cuda.device_count() < layout.num_ranks:
        pytest.skip(f"{layout.num_ranks} ranks need as many GPUs")
    settings = TrainerSettings(
        kind="megatron" if layout else "peft",
        max_tokens_per_microbatch=64,
        megatron=layout or MegatronSettings(),
        gradient_checkpointing=gradient_checkpointing,
    )
    make = megatron if layout else PeftTrainer
    return make(
        str(model),
        dtype="float32",
        settings=settings,
        temperature=TEMPERATURE,
        writer=Writer(),
        log_path=model / "log",
        **extra,
    )


def relative(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


# Llama's layers are those of SmolLM2, which tests/real trains.
CASES = [*(("qwen2", layout) for layout in LAYOUTS), ("qwen3", "1x1"), ("experts", "PP2")]


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_agrees_with_peft(lives: Lives, model: str, layout: str) -> None:
    assert_same(lives(model, layout)[0], lives(model, "peft")[0])


@pytest.mark.parametrize("layout", ["TP2", "DP2"])
def test_dora_is_pefts(lives: Lives, folders: dict[str, Path], samples: list[Sample], layout: str) -> None:
    (found, folder), (expected, _) = lives("qwen2", layout, dora=True), lives("qwen2", "peft", dora=True)
    assert_same(found, expected)
    assert_same_logprobs(load_in_peft(folders["qwen2"], folder), samples, found.logprobs)
    assert any(name.endswith("q_proj.lora_magnitude_vector") for name in found.weights)
    plain, _ = lives("qwen2", layout)
    assert relative(found.losses[:1], plain.losses[:1]) <= 1e-5  # it begins as the base
    assert relative(found.losses[2:], plain.losses[2:]) > 1e-3


def test_dropout(run: RunTrainer, folders: dict[str, Path], samples: list[Sample]) -> None:
    """Of the adapter's input, in forward and backward; not of logprobs."""
    trainer = make_trainer(folders["qwen2"], LAYOUTS["1x1"], ShowingTrainer)
    found: list[Any] = []

    async def train() -> None:
        found.extend(await trainer._ranks.call("with_dropout"))
        await trainer.create_adapter("policy", replace(LORA, dropout=0.5))
        await trainer.forward_backward("policy", samples, surrogate)
        await trainer.optim_step("policy", replace(ADAM, lr=3e-2))
        first, second = [np.concatenate(await trainer.logprobs("policy", samples)) for _ in range(2)]
        np.testing.assert_array_equal(first, second)
        one, other = [(await trainer.forward_backward("policy", samples, surrogate))["loss"] for _ in range(2)]
        assert relative([one], [other]) > 1e-4

    run(trainer, train)
    for layer in found:
        for name, (got, right) in layer.items():
            # Sums in float32, whose order is the processor's: of entries of some 200 one was 1.8e-5 off where it has AMX.
            torch.testing.assert_close(got, right, atol=1e-3, rtol=3e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_layers_that_run_twice_drop_the_same(run: RunTrainer, folders: dict[str, Path], samples: list[Sample]) -> None:
    found: list[list[float]] = []

    async def train(trainer: RankTrainer) -> None:
        await trainer.create_adapter("policy", replace(LORA, dropout=0.5))
        first = (await trainer.forward_backward("policy", samples, surrogate))["loss"]
        norm = (await trainer.optim_step("policy", replace(ADAM, lr=3e-2))).grad_norm
        found.append([first, norm, (await trainer.forward_backward("policy", samples, surrogate))["loss"]])

    for checkpointing in (False, True):
        trainer = make_trainer(folders["qwen2"], LAYOUTS["1x1"], gradient_checkpointing=checkpointing)
        run(trainer, partial(train, trainer))
    assert relative(*found) <= 1e-5


@pytest.mark.parametrize("layout", ["1x1", "TP2xPP2"])
def test_a_warm_up_leaves_nothing(
    run: RunTrainer, folders: dict[str, Path], samples: list[Sample], layout: str
) -> None:
    """Neither in the next gradient, nor in what is dropped next; on CPUs it is not made by itself."""
    found: list[list[float]] = []

    async def train(trainer: RankTrainer, warm_up: bool) -> None:
        await trainer.create_adapter("policy", replace(LORA, dropout=0.5))
        losses = []
        for _ in range(2):
            if warm_up:
                await trainer._ranks.call("warm_up", "policy")
            losses.append(float((await trainer.forward_backward("policy", samples, surrogate))["loss"]))
            losses.append((await trainer.optim_step("policy", ADAM)).grad_norm)
        found.append(losses)

    for warm_up in (False, True):
        trainer = make_trainer(folders["qwen2"], LAYOUTS[layout])
        run(trainer, partial(train, trainer, warm_up))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("model", "layout"), [("qwen2", "1x1"), ("qwen3", "TP2, sequence parallel"), ("qwen2", "PP2, interleaved")]
)
def test_after_a_warm_up_nothing_is_left_to_compile(
    run: RunTrainer, folders: dict[str, Path], samples: list[Sample], model: str, layout: str
) -> None:
    trainer = make_trainer(folders[model], LAYOUTS[layout], ShowingTrainer)

    async def train() -> None:
        await trainer.create_adapter("policy", LORA)
        batches = [samples[:1], samples[:3], samples[:8], samples[2:5]]
        assert await trainer._ranks.call("count_compiled", "policy", batches) == 0

    run(trainer, train)


def assert_same(found: Life, expected: Life) -> None:
    assert relative(found.losses, expected.losses) <= 1e-5
    assert relative(found.norms, expected.norms) <= 1e-5
    assert relative(found.other_losses, expected.other_losses) <= 1e-5
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4, rtol=0)
    np.testing.assert_allclose(found.base_logprobs, expected.base_logprobs, atol=1e-4, rtol=0)
    assert found.weights.keys() == expected.weights.keys()
    for name, tensor in expected.weights.items():
        torch.testing.assert_close(found.weights[name], tensor, atol=1e-5, rtol=0, msg=name)
    assert found.nonfinite_was_skipped
    assert relative([found.next_loss], [expected.next_loss]) <= 1e-4


@pytest.mark.parametrize("layout", ["1x1", "DP2", "PP2"])
def test_metrics_are_those_of_the_whole_batch(lives: Lives, layout: str) -> None:
    found, expected = lives("qwen2", layout)[0].metrics, lives("qwen2", "peft")[0].metrics
    timed = {"forward_backward_seconds", "mfu"}
    assert found.keys() == expected.keys()
    assert found["num_tokens"] == expected["num_tokens"]
    for name in found.keys() - timed:
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name


@pytest.mark.parametrize("layout", ["TP2", "TP2xPP2", "DP2"])
def test_what_is_saved_loads_in_peft(
    lives: Lives, folders: dict[str, Path], samples: list[Sample], layout: str
) -> None:
    life, folder = lives("qwen2", layout)
    assert_same_logprobs(load_in_peft(folders["qwen2"], folder), samples, life.logprobs)


def load_in_peft(model: Path, folder: Path) -> peft.PeftModel:
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, folder / "adapter")


def assert_same_logprobs(model: Any, samples: list[Sample], expected: NDArray[np.float32]) -> None:
    parts = []
    for sample in samples:
        tokens = torch.from_numpy(sample.tokens).long()
        with torch.no_grad():
            everything = (model(tokens[None]).logits[0, :-1].float() / TEMPERATURE).log_softmax(-1)
        chosen = everything.gather(-1, tokens[1:, None])[:, 0].numpy()
        parts.append(np.where(sample.loss_mask, np.concatenate([[0.0], chosen]), 0.0))
    np.testing.assert_allclose(np.concatenate(parts), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("saved", "layout"), [("TP2", "PP2"), ("peft", "TP2"), ("TP2", "peft")])
def test_goes_on_from_what_another_layout_or_trainer_saved(
    run: RunTrainer, lives: Lives, folders: dict[str, Path], samples: list[Sample], saved: str, layout: str
) -> None:
    life, folder = lives("qwen2", saved)
    trainer = make_trainer(folders["qwen2"], LAYOUTS.get(layout))
    found = []

    async def go_on() -> None:
        await trainer.create_adapter("policy", LORA)
        await trainer.load("policy", folder)
        for _ in range(2):
            metrics = await trainer.forward_backward("policy", samples, surrogate)
            await trainer.optim_step("policy", ADAM)
        found.append(metrics["loss"])

    run(trainer, go_on)
    assert relative(found, [life.next_loss]) <= 1e-5


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_imports_an_adapter_of_pefts_and_merges_it(
    run: RunTrainer, folders: dict[str, Path], samples: list[Sample], tmp_path: Path, dora: bool
) -> None:
    """No optimizer's state lies beside it, so there is none to load."""
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=list(LORA.targets), init_lora_weights=False, use_dora=dora
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folders["qwen2"], dtype=torch.float32), config)
    model.save_pretrained(tmp_path / "adapter")
    trainer = make_trainer(folders["qwen2"], LAYOUTS["TP2"], ShowingTrainer)
    found: list[Any] = []
    merged: dict[str, Tensor] = {}

    async def load() -> None:
        await trainer.create_adapter("policy", replace(LORA, dora=dora))
        await trainer.load("policy", tmp_path)
        found.extend(await trainer.logprobs("policy", samples))
        with pytest.raises(RefitError, match="the engine hung up"):
            await trainer._ranks.call("send_to_nobody", "policy")  # and the other rank does not wait for this one
        merged.update(await trainer._ranks.call("merged", "policy"))
        await trainer.create_adapter("other", OTHER)
        with pytest.raises(TrainerError, match=r"does not fit adapter 'other'"):
            await trainer.load("other", tmp_path)

    run(trainer, load)
    assert_same_logprobs(model, samples, np.concatenate(found))
    expected = model.merge_and_unload().state_dict()
    expected.pop("lm_head.weight")  # tied
    merged.pop("lm_head.weight", None)
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-5, rtol=0, msg=name)


def test_fast_layer_is_megatrons_layer(
    run: RunTrainer, lives: Lives, folders: dict[str, Path], samples: list[Sample], tmp_path: Path
) -> None:
    found: list[Life] = []
    trainer = make_trainer(folders["qwen2"], LAYOUTS["1x1"], MegatronsLayerTrainer)
    run(trainer, partial(live, trainer, samples, tmp_path, found))
    fast, _ = lives("qwen2", "1x1")
    assert relative(found[0].losses, fast.losses) <= 1e-5
    assert relative(found[0].norms, fast.norms) <= 1e-5
    np.testing.assert_allclose(found[0].logprobs, fast.logprobs, atol=1e-5, rtol=0)


@dataclass
class Update:
    """What one PPO update left."""

    metrics: Metrics
    logprobs: NDArray[np.float32]
    values: NDArray[np.float32]
    values_after_load: NDArray[np.float32]


@pytest.fixture(scope="module")
def updates(
    run: RunTrainer, folders: dict[str, Path], samples: list[Sample], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Update]:
    """layout, or `peft` -> what an update of policy and critic in four minibatches does there."""
    config = ppo.Config(
        num_epochs=2,
        num_minibatches=2,
        kl_coef=0.1,
        optim={"lr": 3e-3, "eps": 1e-4},
        critic={"optim": {"lr": 3e-3, "eps": 1e-4}, "clip": 0.2},
    )
    generator = np.random.default_rng(0)
    groups = [
        Group(Prompt(ordinal, ordinal, 0, None), rollouts, tuple(generator.random(len(rollouts)).tolist()), 0)
        for ordinal in range(4)
        if (rollouts := tuple(as_rollout(sample) for sample in samples if sample.prompt_id == ordinal))
    ]

    @cache
    def get(layout: str) -> Update:
        folder, found = tmp_path_factory.mktemp("updated"), []
        trainer = make_trainer(folders["qwen2"], LAYOUTS.get(layout))

        async def update() -> None:
            await trainer.create_adapter("policy", LORA)
            await trainer.create_adapter("critic", OTHER, "value")
            metrics = await ppo.update(trainer, groups, config, {})
            logprobs = np.concatenate(await trainer.logprobs("policy", samples))
            values = np.concatenate(await trainer.values("critic", samples))
            await trainer.save("critic", folder)
            for _ in range(2):  # one that is not there may be removed, too
                await trainer.remove_adapter("critic")
            await trainer.create_adapter("critic", OTHER, "value")
            await trainer.load("critic", folder)
            found.append(Update(metrics, logprobs, values, np.concatenate(await trainer.values("critic", samples))))

        run(trainer, update)
        return found[0]

    return get


def as_rollout(sample: Sample) -> Rollout:
    return Rollout(sample.tokens, sample.loss_mask, sample.rollout_logprobs, 0, "stop", 1, "")


@pytest.mark.parametrize("layout", ["1x1", "TP2xPP2", "DP2", "TP2, sequence parallel", "PP2, interleaved"])
def test_an_update_with_a_critic_agrees_with_peft(updates: Callable[[str], Update], layout: str) -> None:
    found, expected = updates(layout), updates("peft")
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4, rtol=0)
    np.testing.assert_allclose(found.values, expected.values, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(found.values, found.values_after_load)
    assert abs(expected.values).max() > 0.1
    for name in (
        "loss/policy",
        "loss/value",
        "optim/grad_norm",
        "value/grad_norm",
        "policy/update_kl_max",
        "value/clip_frac",
    ):
        assert found.metrics[name] == pytest.approx(expected.metrics[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("layout", ["PP2, interleaved", "peft"])
def test_a_critic_learns_from_a_single_microbatch(
    run: RunTrainer, folders: dict[str, Path], samples: list[Sample], layout: str
) -> None:
    """Interleaved stages then get an empty one beside it."""
    trainer = make_trainer(folders["qwen2"], LAYOUTS.get(layout))
    few = [replace(sample, returns=np.ones(len(sample.tokens), np.float32)) for sample in samples[:2]]
    losses: list[float] = []

    async def train() -> None:
        await trainer.create_adapter("critic", OTHER, "value")
        for _ in range(3):
            losses.append((await trainer.forward_backward("critic", few, value_loss))["loss"])
            await trainer.optim_step("critic", ADAM)

    run(trainer, train)
    expected = sum(float(sample.loss_weights[sample.loss_mask].sum()) for sample in few) / 2
    assert losses[0] == pytest.approx(expected, rel=1e-5), "values are 0 at first"
    assert losses[2] < losses[1] < losses[0]


def test_what_autograd_would_have_done() -> None:
    subprocess.run([sys.executable, str(Path(__file__).with_name("layer_checks.py"))], check=True)


def test_a_rank_that_dies_ends_the_call_with_its_number(folders: dict[str, Path], samples: list[Sample]) -> None:
    async def kill_one() -> None:
        async with make_trainer(folders["qwen2"], LAYOUTS["TP2"]) as trainer:
            await trainer.create_adapter("policy", LORA)
            pid = trainer._ranks._ranks[1].process.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(TrainerError, match="trainer rank 1 was killed by SIGKILL"):
                await trainer.forward_backward("policy", samples, surrogate)

    anyio.run(kill_one)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"tensor_parallel": 3}, r"tensor-parallel 3: .*8 attention heads"),
        ({"tensor_parallel": 8}, r"tensor-parallel 8: .*4 key-value heads"),
        ({"pipeline_parallel": 2, "virtual_stages": 3}, r"virtual-stages 3: expected at least 6 layers, got .* 5"),
    ],
)
def test_refuses_what_does_not_divide_before_any_process_starts(
    folders: dict[str, Path], layout: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_trainer(folders["qwen2"], MegatronSettings(**layout))


def test_stages_share_the_layers_and_the_head() -> None:
    assert share_layers(5, 2, head_cost=0.1) == [3, 2]
    assert share_layers(32, 2, head_cost=1.6) == [17, 15]  # 17 against 16.6
    assert share_layers(32, 4, head_cost=1.6) == [9, 8, 8, 7]
    assert share_layers(4, 4, head_cost=9.0) == [1, 1, 1, 1]
    assert share_layers(30, 2, head_cost=40.0) == [29, 1]


@pytest.mark.parametrize("layout", ["1x1", "PP2", "PP2, interleaved"])
def test_every_rank_writes_its_passes(lives: Lives, layout: str) -> None:
    """Of each microbatch and chunk, forward before backward; the head is on the last stage."""
    _, folder = lives("qwen2", layout)
    settings = LAYOUTS[layout]
    events = [event for event in jsonl.read(folder / "events.jsonl") if event["resource"] != "trainer"]
    assert {event["resource"] for event in events} == {f"trainer-{rank}" for rank in range(settings.num_ranks)}
    assert all(event["start"] <= event["end"] for event in events)
    heads = {event["resource"] for event in events if event["name"] == "head"}
    assert heads == {f"trainer-{settings.num_ranks - 1}"}
    for rank in range(settings.num_ranks):
        mine = [event for event in events if event["resource"] == f"trainer-{rank}"]
        passes = {name: [e for e in mine if e["name"] == name] for name in ("forward", "backward")}
        places = {(e["fields"]["microbatch"], e["fields"]["chunk"]) for e in passes["backward"]}
        assert len({chunk for _, chunk in places}) == settings.virtual_stages
        assert places == {(e["fields"]["microbatch"], e["fields"]["chunk"]) for e in passes["forward"]}
        assert len(places) > 2
        for place in places:
            starts = [
                next(e["start"] for e in passes[name] if (e["fields"]["microbatch"], e["fields"]["chunk"]) == place)
                for name in ("forward", "backward")
            ]
            assert starts == sorted(starts)
        assert {"reduce_gradient", "optimizer"} <= {event["name"] for event in mine}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            Qwen2Config(**SHAPE, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}),
            "does not support rotary embeddings that Megatron computes otherwise; use --trainer.kind peft",
        ),
        (
            Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=16, max_window_layers=0),
            "has a sliding window of 16 tokens; packed attention supports it only for microbatches that are shorter",
        ),
    ],
    ids=["rotary embeddings", "sliding window"],
)
def test_refuses_what_it_would_compute_wrongly(
    run: RunTrainer, samples: list[Sample], tmp_path: Path, config: Qwen2Config, message: str
) -> None:
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    trainer = make_trainer(tmp_path, LAYOUTS["1x1"])

    async def train() -> None:
        await trainer.create_adapter("policy", LORA)
        await trainer.forward_backward("policy", samples, surrogate)

    with pytest.raises(TrainerError, match=message):
        run(trainer, train)


def test_of_experts_those_are_counted_that_a_token_goes_through(run: RunTrainer, folders: dict[str, Path]) -> None:
    saved = load_file(folders["experts"] / "model.safetensors")
    layers = {name: each.numel() for name, each in saved.items() if each.ndim == 2 and ".layers." in name}
    experts = sum(number for name, number in layers.items() if ".experts." in name)
    attention = sum(number for name, number in layers.items() if ".self_attn." in name)
    assert experts
    found: list[int] = []

    async def count(trainer: RankTrainer) -> None:
        found.append(await trainer._ranks.call("num_body"))

    for layout in (LAYOUTS["1x1"], None):
        trainer = make_trainer(folders["experts"], layout)
        run(trainer, partial(count, trainer))
    assert found == [attention + experts // 2] * 2


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (LlamaForCausalLM, LlamaConfig(**SHAPE, mlp_bias=True)),
        (Olmo2ForCausalLM, Olmo2Config(**SHAPE)),
    ],
)
def test_what_megatron_bridge_cannot_load_is_for_the_other_trainer(
    run: RunTrainer, tmp_path: Path, model_class: Any, config: Any
) -> None:
    model_class(config).save_pretrained(tmp_path)

    async def nothing() -> None:
        pass

    with pytest.raises(TrainerError, match=r"Megatron-Bridge could not load the model \(.*use --trainer.kind peft"):
        run(make_trainer(tmp_path, LAYOUTS["1x1"]), nothing)


def test_saved_state_is_in_pefts_names(lives: Lives) -> None:
    """Whole tensors, so it does not matter who saved them."""
    (_, one), (_, other) = lives("qwen2", "TP2xPP2"), lives("qwen2", "peft")
    for file in ("adapter/adapter_model.safetensors", "state/optimizer.safetensors"):
        found, expected = load_file(one / file), load_file(other / file)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-3, msg=name)
