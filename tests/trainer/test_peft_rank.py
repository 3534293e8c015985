"""The rank's arithmetic against plain transformers + peft, sample by sample, in this process."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Lfm2Config, OPTConfig

from rlloop.config import TrainerSettings
from rlloop.errors import NonFiniteError, TrainerError
from rlloop.trainer import TokenBatch
from rlloop.trainer.peft_rank import PeftRank
from rlloop.trainer.rank_trainer import RankArguments
from rlloop.trainer.ranks import Interrupted, RankContext
from rlloop.types import AdamConfig, LoraConfig, Sample

MakeSamples = Callable[..., list[Sample]]
TEMPERATURE = 0.8
LORA = LoraConfig(rank=4, alpha=8.0)
# With the usual eps, a weight whose gradient is rounding noise moves by a whole learning rate.
ADAM = AdamConfig(lr=3e-3, eps=1e-4, weight_decay=0.1, max_grad_norm=0.5)


class Writer:
    def write(self, tensors: Mapping[str, Tensor], scale: float) -> Any:
        return {name: tensor.clone() for name, tensor in tensors.items()}, scale

    def close(self) -> None:
        pass


class Sender:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.sent: dict[str, Tensor] = {}

    location = "here"

    def listen(self) -> None:
        pass

    def send(self, weights: Iterator[tuple[str, Tensor]], check_interrupt: Callable[[], None]) -> None:
        self.sent = {name: weight.clone() for name, weight in weights}

    def close(self) -> None:
        pass


def surrogate(logprobs: Tensor, tokens: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
    ratio = (logprobs - tokens.rollout_logprobs).exp()
    return -(tokens.loss_weights * ratio * tokens.advantages).sum(), {"ratio": ratio}


def make_rank(
    model: str, dtype: str = "float32", interrupted: Any = None, sender: Sender | None = None, **settings: Any
) -> PeftRank:
    context = RankContext(0, 1, interrupted or SimpleNamespace(value=0), call_number=1)
    arguments = RankArguments(model, dtype, TrainerSettings(**settings), TEMPERATURE, Writer(), sender, seed=0)
    return PeftRank(context, arguments)


@pytest.fixture
def rank(models: dict[str, str]) -> PeftRank:
    rank = make_rank(models["llama"])
    rank.create_adapter("policy", LORA)
    return rank


def weights(rank: PeftRank, name: str = "policy") -> dict[str, Tensor]:
    tensors, _ = rank.export_adapter(name)  # type: ignore[misc]
    return tensors  # type: ignore[no-any-return]


def moments(rank: PeftRank, folder: Path) -> dict[str, Tensor]:
    rank.save("policy", folder)
    return load_file(folder / "state" / "optimizer.safetensors")


def assert_equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for key in left:
        assert torch.equal(left[key], right[key]), key


def gradients(rank: PeftRank) -> list[Tensor]:
    return [p.grad.clone() for p in rank._adapters["policy"].parameters.values() if p.grad is not None]


class Reference:
    """transformers + peft from a saved adapter: padded rows, all logits, torch's AdamW."""

    def __init__(self, model: str, folder: Path) -> None:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
        self.model = PeftModel.from_pretrained(base, str(folder / "adapter"), is_trainable=True).eval()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=ADAM.lr, betas=ADAM.betas, eps=ADAM.eps, weight_decay=ADAM.weight_decay
        )

    def logprobs(self, samples: list[Sample]) -> list[Tensor]:
        length = max(len(s.tokens) for s in samples)
        tokens = torch.zeros(len(samples), length, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, s in enumerate(samples):
            tokens[row, : len(s.tokens)], mask[row, : len(s.tokens)] = torch.from_numpy(s.tokens).long(), 1
        logits = self.model(input_ids=tokens, attention_mask=mask).logits / TEMPERATURE
        taken = logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
        rows = []
        for row, s in zip(taken, samples, strict=True):
            full = torch.cat([torch.zeros(1), row])[: len(s.tokens)]
            rows.append(torch.where(torch.from_numpy(s.loss_mask), full, 0.0))
        return rows

    def step(self, samples: list[Sample]) -> tuple[float, float]:
        """-> loss, gradient norm before clipping"""
        loss = torch.zeros(())
        for row, s in zip(self.logprobs(samples), samples, strict=True):
            ratio = (row - torch.from_numpy(s.rollout_logprobs)).exp()
            terms = torch.from_numpy(s.loss_weights) * ratio * torch.from_numpy(s.advantages)
            loss = loss - terms[torch.from_numpy(s.loss_mask)].sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, ADAM.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach()), float(norm)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_three_steps_equal_transformers_and_peft(
    models: dict[str, str], make_samples: MakeSamples, tmp_path: Path, name: str, checkpointing: bool
) -> None:
    rank = make_rank(models[name], max_tokens_per_microbatch=60, gradient_checkpointing=checkpointing)
    rank.create_adapter("policy", LORA)
    rank.save("policy", tmp_path)
    reference = Reference(models[name], tmp_path)
    for step in range(3):
        samples = make_samples(seed=step)
        metrics = rank.forward_backward("policy", samples, surrogate)
        result = rank.optim_step("policy", ADAM)
        loss, norm = reference.step(samples)
        assert metrics["loss"] == pytest.approx(loss, abs=1e-5)
        assert result.grad_norm == pytest.approx(norm, rel=1e-5)
        assert not result.skipped
    samples = make_samples(seed=9)
    with torch.no_grad():
        expected = reference.logprobs(samples)
    for row, wanted in zip(rank.logprobs("policy", samples), expected, strict=True):
        np.testing.assert_allclose(row, wanted, atol=1e-5)
    for key, tensor in get_peft_model_state_dict(reference.model).items():
        torch.testing.assert_close(weights(rank)[key], tensor, atol=1e-5, rtol=0)


SMALL = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}
MIXES = Lfm2Config(**SMALL, num_key_value_heads=2, intermediate_size=80, layer_types=["conv", "full_attention"])
DROPS = OPTConfig(**SMALL, ffn_dim=80, word_embed_proj_dim=48, dropout=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("config", "checkpointing", "is_refused"),
    [(MIXES, False, True), (DROPS, False, False), (DROPS, True, True)],
    ids=["convolutions", "dropout that is off", "dropout in layers that are checkpointed"],
)
def test_a_model_that_computes_rows_otherwise_is_refused(
    config: Any, checkpointing: bool, is_refused: bool, dtype: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.2)
    model.save_pretrained(tmp_path)
    expected = pytest.raises(
        TrainerError, match=r"expected logprobs that do not depend on other answers .* by 0\.[1-9]"
    )
    with expected if is_refused else nullcontext():
        make_rank(str(tmp_path), dtype, gradient_checkpointing=checkpointing)


@pytest.mark.parametrize(("checkpointing", "times"), [(False, 1), (True, 2)])
def test_checkpointed_layers_are_computed_anew(
    models: dict[str, str], make_samples: MakeSamples, checkpointing: bool, times: int
) -> None:
    rank = make_rank(models["llama"], gradient_checkpointing=checkpointing)
    rank.create_adapter("policy", LORA)
    computed: list[int] = []
    rank._decoder.layers[0].self_attn.register_forward_hook(lambda *_: computed.append(1))
    rank.forward_backward("policy", make_samples(), surrogate)
    assert len(computed) == times


def test_saved_adapter_is_pefts(
    models: dict[str, str], rank: PeftRank, make_samples: MakeSamples, tmp_path: Path
) -> None:
    rank.forward_backward("policy", make_samples(), surrogate)
    rank.optim_step("policy", ADAM)
    rank.save("policy", tmp_path)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == models["llama"]
    assert (config["r"], config["lora_alpha"], config["inference_mode"]) == (4, 8.0, True)
    samples = make_samples(seed=3)
    reference = Reference(models["llama"], tmp_path)
    assert weights(rank).keys() == get_peft_model_state_dict(reference.model).keys()
    with torch.no_grad():
        expected = reference.logprobs(samples)
        with reference.model.disable_adapter():
            expected_of_base = reference.logprobs(samples)
    for rows, wanted in (
        (rank.logprobs("policy", samples), expected),
        (rank.logprobs(None, samples), expected_of_base),
    ):
        for ours, theirs in zip(rows, wanted, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert any(abs(a - b).max() > 1e-3 for a, b in zip(expected, expected_of_base, strict=True))


@pytest.mark.parametrize("dora", [False, True])
def test_weights_that_are_sent_are_those_that_peft_merges(
    models: dict[str, str], make_samples: MakeSamples, tmp_path: Path, dora: bool
) -> None:
    sender = Sender()
    rank = make_rank(models["llama"], sender=sender)
    rank.create_adapter("other", LORA)
    rank.create_adapter("policy", replace(LORA, dora=dora))
    for _ in range(2):
        rank.forward_backward("policy", make_samples(), surrogate)
        rank.optim_step("policy", ADAM)
    rank.send_weights("policy")
    rank.save("policy", tmp_path)
    base = AutoModelForCausalLM.from_pretrained(models["llama"], dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    expected = dict(merged.named_parameters())
    assert sender.sent.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(sender.sent[name], weight.detach(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("max_tokens", [16, 30, 75])
def test_neither_microbatches_nor_order_nor_calls_nor_sharing_change_the_gradient(
    models: dict[str, str], rank: PeftRank, make_samples: MakeSamples, max_tokens: int
) -> None:
    samples = make_samples()
    whole = rank.forward_backward("policy", samples, surrogate)
    expected = gradients(rank)
    split = make_rank(models["llama"], max_tokens_per_microbatch=max_tokens)
    split.create_adapter("policy", LORA)
    unshared = [replace(sample, prompt_id=index) for index, sample in enumerate(samples)]
    for batches in ([samples], [samples[::-1]], [samples[:5], samples[5:]], [unshared]):
        metrics = [split.forward_backward("policy", batch, surrogate) for batch in batches]
        for gradient, wanted in zip(gradients(split), expected, strict=True):
            torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-4)
        assert sum(m["loss"] for m in metrics) == pytest.approx(whole["loss"], abs=1e-5)
        assert sum(m["num_tokens"] for m in metrics) == whole["num_tokens"]
        if len(metrics) == 1:
            for key in ("ratio/mean", "ratio/max", "entropy/mean", "entropy/max"):
                assert metrics[0][key] == pytest.approx(whole[key], rel=1e-4)
        split._adapters["policy"].optimizer.zero_grad()


def test_metrics(rank: PeftRank, make_samples: MakeSamples) -> None:
    samples = make_samples()
    metrics = rank.forward_backward("policy", samples, surrogate)
    logprobs = np.concatenate(rank.logprobs("policy", samples))
    mask = np.concatenate([s.loss_mask for s in samples])
    ratio = np.exp(logprobs - np.concatenate([s.rollout_logprobs for s in samples]))[mask]
    assert metrics["num_tokens"] == mask.sum()
    assert metrics["num_computed_tokens"] < sum(len(s.tokens) for s in samples)
    assert metrics["ratio/mean"] == pytest.approx(ratio.mean(), rel=1e-4)
    assert metrics["ratio/max"] == pytest.approx(ratio.max(), rel=1e-4)
    assert metrics["forward_backward_seconds"] > 0
    assert metrics["mfu"] > 0
    assert {"entropy/mean", "loss"} <= metrics.keys()


def test_resume_is_bit_exact(models: dict[str, str], make_samples: MakeSamples, tmp_path: Path) -> None:
    def train(rank: PeftRank, steps: range) -> None:
        for step in steps:
            rank.forward_backward("policy", make_samples(seed=step), surrogate)
            rank.optim_step("policy", ADAM)

    straight, first, second = (make_rank(models["llama"]) for _ in range(3))
    for rank in (straight, first, second):
        rank.create_adapter("policy", LORA)
    train(straight, range(4))
    train(first, range(2))
    first.save("policy", tmp_path / "checkpoint")
    train(second, range(7, 8))  # what it had is overwritten
    second.load("policy", tmp_path / "checkpoint")
    train(second, range(2, 4))
    assert_equal(weights(second), weights(straight))
    assert_equal(moments(second, tmp_path / "second"), moments(straight, tmp_path / "straight"))


def test_load_refuses_another_shape(rank: PeftRank, tmp_path: Path) -> None:
    rank.save("policy", tmp_path)
    rank.create_adapter("small", replace(LORA, rank=2))
    rank.create_adapter("few", replace(LORA, targets=("q_proj",)))
    for name in ("small", "few"):
        with pytest.raises(TrainerError, match=r"does not fit adapter.*lora\.rank"):
            rank.load(name, tmp_path)


def nonfinite_loss(logprobs: Tensor, tokens: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
    return logprobs.sum() + torch.inf, {}


def nonfinite_gradient(logprobs: Tensor, tokens: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
    return (logprobs - logprobs.detach()).abs().sqrt().sum(), {}  # 0, with an infinite slope


@pytest.mark.parametrize("loss", [nonfinite_loss, nonfinite_gradient])
def test_nonfinite_step_changes_nothing(rank: PeftRank, make_samples: MakeSamples, tmp_path: Path, loss: Any) -> None:
    rank.forward_backward("policy", make_samples(), surrogate)
    rank.optim_step("policy", ADAM)
    before, moments_before = weights(rank), moments(rank, tmp_path / "before")
    rank.forward_backward("policy", make_samples(), loss)
    result = rank.optim_step("policy", ADAM)
    assert result.skipped
    assert not np.isfinite(result.grad_norm)
    assert_equal(weights(rank), before)
    assert_equal(moments(rank, tmp_path / "after"), moments_before)
    rank.forward_backward("policy", make_samples(seed=1), surrogate)
    result = rank.optim_step("policy", ADAM)
    assert not result.skipped
    assert np.isfinite(result.grad_norm)


def test_several_nonfinite_steps_in_a_row_end_it(rank: PeftRank, make_samples: MakeSamples) -> None:
    def step(loss: Any) -> None:
        rank.forward_backward("policy", make_samples(), loss)
        rank.optim_step("policy", ADAM)

    for loss in (nonfinite_loss, nonfinite_loss, surrogate, nonfinite_loss, nonfinite_loss):
        step(loss)
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        step(nonfinite_loss)


def test_adapters_do_not_touch_each_other(models: dict[str, str], rank: PeftRank, make_samples: MakeSamples) -> None:
    samples = make_samples()
    alone = make_rank(models["llama"])
    alone.create_adapter("policy", LORA)
    rank.create_adapter("other", LoraConfig(rank=2, alpha=4.0, targets=("q_proj", "down_proj"), seed=5))
    for step in range(2):
        for each in (rank, alone):
            each.forward_backward("policy", make_samples(seed=step), surrogate)
        rank.forward_backward("other", make_samples(seed=step + 5), surrogate)
        rank.logprobs(None, samples)
        for each in (rank, alone):
            each.optim_step("policy", ADAM)
        rank.optim_step("other", replace(ADAM, lr=0.1))
    assert_equal(weights(rank), weights(alone))
    for _ in range(2):  # one that is not there may be removed, too
        rank.remove_adapter("other")
    np.testing.assert_array_equal(
        np.concatenate(rank.logprobs("policy", samples)), np.concatenate(alone.logprobs("policy", samples))
    )
    with pytest.raises(TrainerError, match="no adapter is named 'other'; there are: policy"):
        rank.forward_backward("other", samples, surrogate)
    rank.remove_adapter("policy")
    fresh = make_rank(models["llama"])
    np.testing.assert_array_equal(
        np.concatenate(rank.logprobs(None, samples)), np.concatenate(fresh.logprobs(None, samples))
    )
    rank.create_adapter("policy", LORA)
    fresh.create_adapter("policy", LORA)
    assert_equal(weights(rank), weights(fresh))


def test_a_new_adapter_is_the_base_and_drawn_by_seed_and_name(rank: PeftRank, make_samples: MakeSamples) -> None:
    samples = make_samples()
    for ours, base in zip(rank.logprobs("policy", samples), rank.logprobs(None, samples), strict=True):
        np.testing.assert_array_equal(ours, base)
    rank.create_adapter("same", LORA)
    rank.create_adapter("different", replace(LORA, seed=1))
    assert_equal(weights(rank, "same"), weights(rank))
    a = [key for key in weights(rank) if ".lora_A." in key]
    assert all(not torch.equal(weights(rank)[key], weights(rank, "different")[key]) for key in a)
    for key in a:  # PEFT's own initialisation: uniform within 1 / sqrt(fan in)
        tensor = weights(rank)[key]
        assert 0.9 < tensor.abs().max() * tensor.shape[1] ** 0.5 <= 1
    with pytest.raises(TrainerError, match="exists already"):
        rank.create_adapter("same", LORA)


def test_export_gives_the_weights_and_their_scale(rank: PeftRank) -> None:
    tensors, scale = rank.export_adapter("policy")  # type: ignore[misc]
    assert scale == 2.0
    assert len(tensors) == 2 * 7 * 2  # layers, projections, A and B
    assert tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (4, 48)


def test_interrupt_discards_the_gradient_and_save_works(
    models: dict[str, str], make_samples: MakeSamples, tmp_path: Path
) -> None:
    last_interrupted = SimpleNamespace(value=0)
    rank = make_rank(models["llama"], interrupted=last_interrupted, max_tokens_per_microbatch=30)
    rank.create_adapter("policy", LORA)
    seen = 0

    def interrupted(logprobs: Tensor, tokens: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        nonlocal seen
        seen += 1
        last_interrupted.value = 1 if seen == 2 else 0
        return surrogate(logprobs, tokens)

    with pytest.raises(Interrupted):
        rank.forward_backward("policy", make_samples(), interrupted)
    assert seen == 2
    assert not gradients(rank)
    rank.save("policy", tmp_path)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_a_loss_that_raises_discards_the_gradient(rank: PeftRank, make_samples: MakeSamples) -> None:
    rank.forward_backward("policy", make_samples(), surrogate)
    rank.forward_backward("policy", make_samples(), nonfinite_loss)
    with pytest.raises(ZeroDivisionError):
        rank.forward_backward("policy", make_samples(), lambda logprobs, tokens: 1 / 0)
    assert not gradients(rank)
    rank.forward_backward("policy", make_samples(), surrogate)
    assert not rank.optim_step("policy", ADAM).skipped  # the infinite loss was discarded with its gradient


def test_old_and_ref_logprobs_reach_the_loss(rank: PeftRank, make_samples: MakeSamples) -> None:
    samples = [
        replace(s, old_logprobs=s.rollout_logprobs + 1, ref_logprobs=s.rollout_logprobs + 2) for s in make_samples()
    ]

    def check(logprobs: Tensor, tokens: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        assert tokens.old_logprobs is not None
        assert tokens.ref_logprobs is not None
        return logprobs.sum(), {
            "old": tokens.old_logprobs - tokens.rollout_logprobs,
            "ref": tokens.ref_logprobs - tokens.rollout_logprobs,
        }

    metrics = rank.forward_backward("policy", samples, check)
    assert (metrics["old/mean"], metrics["ref/max"]) == (pytest.approx(1), pytest.approx(2))
    with pytest.raises(TrainerError, match="old_logprobs: give it for every sample"):
        rank.forward_backward("policy", [samples[0], replace(samples[1], old_logprobs=None)], check)


def test_a_loss_knows_which_tokens_are_of_one_sample(rank: PeftRank, make_samples: MakeSamples) -> None:
    samples = make_samples()
    lengths = {float(sample.advantages[0]): int(sample.loss_mask.sum()) for sample in samples}
    found = []

    def count(logprobs: Tensor, tokens: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        counts = tokens.sample_index.bincount()
        assert tokens.sample_index.tolist() == torch.arange(len(counts)).repeat_interleave(counts).tolist()
        starts = counts.cumsum(0) - counts
        found.extend(zip(tokens.advantages[starts].tolist(), counts.tolist(), strict=True))
        return logprobs.sum(), {}

    rank.forward_backward("policy", samples, count)
    assert dict(found) == lengths
    assert len(found) == len(samples)


def test_samples_without_loss_tokens(rank: PeftRank, make_samples: MakeSamples) -> None:
    empty = [replace(s, loss_mask=np.zeros_like(s.loss_mask)) for s in make_samples()]
    assert rank.forward_backward("policy", empty, surrogate)["num_tokens"] == 0
    assert all(not row.any() for row in rank.logprobs("policy", empty))
    assert rank.logprobs("policy", []) == []
    before = weights(rank)
    assert rank.optim_step("policy", ADAM).grad_norm == 0
    assert_equal(weights(rank), before)


def test_bf16_is_close_to_fp32(models: dict[str, str], rank: PeftRank, make_samples: MakeSamples) -> None:
    half = make_rank(models["llama"], dtype="bfloat16")
    half.create_adapter("policy", LORA)
    samples = make_samples()
    for each in (rank, half):
        each.forward_backward("policy", samples, surrogate)
        result = each.optim_step("policy", ADAM)
        assert not result.skipped
    assert all(tensor.dtype == torch.float32 for tensor in weights(half).values())
    difference = np.concatenate(half.logprobs("policy", samples)) - np.concatenate(rank.logprobs("policy", samples))
    assert abs(difference).mean() < 0.05


def test_bf16_gradient_points_the_same_way(models: dict[str, str], rank: PeftRank, make_samples: MakeSamples) -> None:
    half = make_rank(models["llama"], dtype="bfloat16")
    half.create_adapter("policy", LORA)
    flat = []
    for each in (rank, half):
        each.forward_backward("policy", make_samples(), surrogate)
        flat.append(torch.cat([gradient.flatten() for gradient in gradients(each)]))
    assert torch.nn.functional.cosine_similarity(*flat, dim=0) > 0.99


def test_a_target_that_is_no_layer_of_the_decoder_is_refused(rank: PeftRank) -> None:
    with pytest.raises(TrainerError, match=r"lora\.targets: expected names among down_proj, .* got lm_head, query$"):
        rank.create_adapter("other", replace(LORA, targets=("q_proj", "query", "lm_head")))


def regression(values: Tensor, tokens: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
    assert tokens.entropy is None
    return (tokens.loss_weights * (values - tokens.returns).square()).sum(), {"value": values}


def with_returns(samples: list[Sample]) -> list[Sample]:
    return [replace(sample, returns=sample.advantages * np.arange(len(sample.tokens))) for sample in samples]


def test_a_value_adapter_equals_transformers_and_peft_with_a_linear_head(
    models: dict[str, str], rank: PeftRank, make_samples: MakeSamples, tmp_path: Path
) -> None:
    """The policy beside it stays what it is."""
    rank.create_adapter("critic", replace(LORA, seed=3), "value")
    assert not np.concatenate(rank.values("critic", make_samples())).any(), "zero before it has learned"
    policy = rank.logprobs("policy", make_samples())
    rank.save("critic", tmp_path)
    reference = Reference(models["llama"], tmp_path)
    head = torch.nn.Linear(48, 1)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    reference.optimizer.add_param_group({"params": head.parameters()})
    reference.parameters += head.parameters()

    def values_of(sample: Sample) -> Tensor:
        tokens = torch.from_numpy(sample.tokens).long()[None]
        hidden = reference.model(input_ids=tokens, output_hidden_states=True).hidden_states[-1][0]
        before = torch.cat([torch.zeros(1), head(hidden)[:-1, 0]])  # a token is sampled from the state before it
        return torch.where(torch.from_numpy(sample.loss_mask), before, 0.0)

    for step in range(3):
        samples = with_returns(make_samples(seed=step))
        metrics = rank.forward_backward("critic", samples, regression)
        result = rank.optim_step("critic", ADAM)
        loss = torch.zeros(())
        for sample in samples:
            errors = (values_of(sample) - torch.from_numpy(sample.returns)).square()
            loss = loss + (torch.from_numpy(sample.loss_weights) * errors)[torch.from_numpy(sample.loss_mask)].sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters, ADAM.max_grad_norm)
        reference.optimizer.step()
        reference.optimizer.zero_grad()
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-5)
        assert metrics.keys() >= {"value/mean", "value/max"}
        assert "entropy/mean" not in metrics
    samples = make_samples(seed=9)
    with torch.no_grad():
        for row, sample in zip(rank.values("critic", samples), samples, strict=True):
            np.testing.assert_allclose(row, values_of(sample), atol=1e-5)
    for row, before in zip(rank.logprobs("policy", make_samples()), policy, strict=True):
        np.testing.assert_array_equal(row, before)


def test_a_value_adapter_goes_on_from_what_was_saved(
    models: dict[str, str], rank: PeftRank, make_samples: MakeSamples, tmp_path: Path
) -> None:
    samples = with_returns(make_samples())

    def step(rank: PeftRank) -> list[Any]:
        rank.forward_backward("critic", samples, regression)
        rank.optim_step("critic", ADAM)
        return rank.values("critic", samples)

    rank.create_adapter("critic", LORA, "value")
    step(rank)
    rank.save("critic", tmp_path)
    expected = step(rank)
    other = make_rank(models["llama"])
    other.create_adapter("critic", LORA, "value")
    other.load("critic", tmp_path)
    for row, wanted in zip(step(other), expected, strict=True):
        np.testing.assert_array_equal(row, wanted)
    assert load_file(tmp_path / "adapter" / "value_head.safetensors")["value_head.weight"].any()
    with pytest.raises(TrainerError, match=r"does not fit adapter 'policy'; at value_head"):
        rank.load("policy", tmp_path)


def test_a_call_for_the_other_head_says_so(rank: PeftRank, make_samples: MakeSamples) -> None:
    rank.create_adapter("critic", LORA, "value")
    for call in (lambda: rank.logprobs("critic", make_samples()), lambda: rank.export_adapter("critic")):
        with pytest.raises(
            TrainerError, match="adapter 'critic' has a value head; this call is for adapters with a policy"
        ):
            call()
    with pytest.raises(TrainerError, match="adapter 'policy' has a policy head"):
        rank.values("policy", make_samples())


def test_a_nonfinite_loss_counts_though_the_next_one_of_the_step_is_finite(
    rank: PeftRank, make_samples: MakeSamples
) -> None:
    before = weights(rank)
    rank.forward_backward("policy", make_samples(), nonfinite_loss)
    rank.forward_backward("policy", make_samples(), surrogate)
    assert rank.optim_step("policy", ADAM).skipped
    assert_equal(weights(rank), before)


def test_what_is_loaded_has_no_gradient_and_no_moments_of_what_was_there(
    models: dict[str, str], rank: PeftRank, make_samples: MakeSamples, tmp_path: Path
) -> None:
    """Neither of a checkpoint of step 0, which has none itself."""
    rank.save("policy", tmp_path)
    rank.forward_backward("policy", make_samples(seed=5), surrogate)
    rank.optim_step("policy", ADAM)
    rank.forward_backward("policy", make_samples(seed=5), surrogate)
    rank.load("policy", tmp_path)
    assert not gradients(rank)
    fresh = make_rank(models["llama"])
    fresh.create_adapter("policy", LORA)
    for each in (rank, fresh):
        each.forward_backward("policy", make_samples(), surrogate)
        each.optim_step("policy", ADAM)
    assert_equal(weights(rank), weights(fresh))


def test_an_interrupt_ends_a_forward_pass(models: dict[str, str], make_samples: MakeSamples) -> None:
    rank = make_rank(models["llama"], interrupted=SimpleNamespace(value=1))
    with pytest.raises(Interrupted):
        rank.logprobs(None, make_samples())


def test_skipped_steps_of_an_adapter_that_is_gone_are_forgotten(rank: PeftRank, make_samples: MakeSamples) -> None:
    for _ in range(2):
        for _ in range(2):
            rank.forward_backward("policy", make_samples(), nonfinite_loss)
            assert rank.optim_step("policy", ADAM).skipped
        rank.remove_adapter("policy")
        rank.create_adapter("policy", LORA)


def test_operations_are_those_of_layers_and_of_a_policys_head(rank: PeftRank, make_samples: MakeSamples) -> None:
    rank.create_adapter("critic", LORA, "value")
    layers = 2 * (48 * 48 + 2 * 48 * 16 + 48 * 48 + 3 * 48 * 80)
    for name, loss, head in (("policy", surrogate, 97 * 48), ("critic", regression, 0)):
        found = rank.forward_backward(name, with_returns(make_samples()), loss)
        flops = found["mfu"] * found["forward_backward_seconds"] * rank._peak_flops
        assert flops == pytest.approx(4 * (layers * found["num_computed_tokens"] + head * found["num_tokens"]))


def test_dropout_is_of_training_alone(rank: PeftRank, make_samples: MakeSamples) -> None:
    rank.create_adapter("drops", replace(LORA, dropout=0.5))
    rank.forward_backward("drops", make_samples(), surrogate)
    rank.optim_step("drops", replace(ADAM, lr=3e-2))
    first, second = (np.concatenate(rank.logprobs("drops", make_samples())) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    one, other = (rank.forward_backward("drops", make_samples(), surrogate)["loss"] for _ in range(2))
    assert abs(one - other) > 1e-4


def test_the_samples_of_a_microbatch_are_counted_without_gaps(
    models: dict[str, str], make_samples: MakeSamples
) -> None:
    """Whatever others lie between them: a loss has as many places as the microbatch has tokens."""
    rank = make_rank(models["llama"], max_tokens_per_microbatch=30)
    rank.create_adapter("policy", LORA)
    found: list[list[int]] = []

    def note(logprobs: Tensor, tokens: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        found.append(tokens.sample_index.unique().tolist())
        return logprobs.sum(), {}

    rank.forward_backward("policy", sorted(make_samples(), key=lambda sample: len(sample.tokens)), note)
    assert max(map(len, found)) > 1
    assert all(each == [*range(len(each))] for each in found)
