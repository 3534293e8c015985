"""Policy losses against hand-computed numbers, finite differences, and TRL's own GRPOTrainer."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlloop.advantages import constant_weights, group_normalised, sequence_weights, token_weights
from rlloop.losses import (
    Surrogate,
    clipped,
    clipped_weight,
    geometric_clipped,
    interpolated_logprobs,
    kl_penalty,
    policy_loss,
    sequence_clipped,
    value_loss,
)
from rlloop.plugins import load_object
from rlloop.trainer import TokenBatch


def float64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def batch(advantages: Tensor, rollout_logprobs: Tensor, **fields: Tensor | None) -> TokenBatch:
    defaults: dict[str, Any] = {
        "loss_weights": torch.ones_like(advantages),
        "old_logprobs": None,
        "ref_logprobs": None,
        "sample_index": torch.zeros(len(advantages), dtype=torch.int64),
        "entropy": torch.zeros_like(advantages),
    }
    return TokenBatch(advantages=advantages, rollout_logprobs=rollout_logprobs, **(defaults | fields))


OLD = float64(0.2, 0.2, 0.2, 0.2, 0.2, 0.2).log()
NEW = float64(0.3, 0.1, 0.22, 0.3, 0.1, 0.22).log()
"""Ratios 1.5, 0.5 and 1.1, once for each sign of the advantage below."""
ADVANTAGES = float64(2, 2, 2, -1, -1, -1)


def test_surrogate_by_hand() -> None:
    tokens = batch(ADVANTAGES, OLD, old_logprobs=OLD)
    loss, metrics = policy_loss(NEW, tokens, surrogate=partial(clipped, clip_low=0.2, clip_high=0.28))
    # A > 0: ratios 1.28 (clipped), 0.5, 1.1; A < 0: ratios 1.5, 0.8 (clipped), 1.1
    assert loss.item() == pytest.approx(-2 * (1.28 + 0.5 + 1.1) + (1.5 + 0.8 + 1.1), abs=1e-6)
    torch.testing.assert_close(metrics["ratio"], float64(1.5, 0.5, 1.1, 1.5, 0.5, 1.1), rtol=0, atol=1e-6)
    assert metrics["clip_frac_high"].tolist() == [1, 0, 0, 0, 0, 0]
    assert metrics["clip_frac_low"].tolist() == [0, 0, 0, 0, 1, 0]
    assert "kl_ref" not in metrics


@pytest.mark.parametrize("reduce", [torch.mean, torch.sum, lambda loss: loss[:, None]])
def test_a_surrogate_that_is_not_of_each_token_is_refused(reduce: Callable[[Tensor], Tensor]) -> None:
    def wrong(logprobs: Tensor, proximal: Tensor, tokens: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        return reduce(logprobs), {}

    with pytest.raises(ValueError, match=r"expected a loss for each token from the surrogate, of shape \[6\], got \["):
        policy_loss(NEW, batch(ADVANTAGES, OLD), surrogate=wrong)


def test_a_clipped_token_has_no_gradient() -> None:
    logprobs = NEW.clone().requires_grad_()
    loss, metrics = policy_loss(logprobs, batch(ADVANTAGES, OLD, old_logprobs=OLD))
    loss.backward()
    # d(-ratio * A) / d(logprob) = -ratio * A where nothing is clipped
    torch.testing.assert_close(logprobs.grad, float64(0, -1.0, -2.2, 1.5, 0, 1.1), rtol=0, atol=1e-6)
    assert not any(metric.requires_grad for metric in metrics.values())


def test_without_old_logprobs_it_is_the_weighted_policy_gradient() -> None:
    logprobs = float64(0.5, 0.5, 0.5).log().requires_grad_()
    rollout = float64(0.5, 0.125, 0.8).log()  # trainer / sampler: 1, 4 and 0.625
    loss, metrics = policy_loss(logprobs, batch(float64(1, 1, -2), rollout), correction={"cap": 2.0})
    assert loss.item() == pytest.approx(-1 - 2 + 1.25, abs=1e-6)
    torch.testing.assert_close(metrics["mismatch_ratio"], float64(1, 4, 0.625), rtol=0, atol=1e-6)
    torch.testing.assert_close(metrics["sampler_kl"], float64(0, 3 - np.log(4), -0.375 - np.log(0.625)))
    loss.backward()
    torch.testing.assert_close(logprobs.grad, float64(-1, -2, 1.25), rtol=0, atol=1e-6)


def test_the_ratio_can_be_to_the_policy_that_sampled() -> None:
    """Then clipping bounds what stale samples do, and the metrics still compare trainer and sampler."""
    logprobs = NEW.clone().requires_grad_()
    loss, metrics = policy_loss(logprobs, batch(ADVANTAGES, OLD), proximal="rollout")
    loss.backward()
    torch.testing.assert_close(logprobs.grad, float64(0, -1.0, -2.2, 1.5, 0, 1.1), rtol=0, atol=1e-6)
    torch.testing.assert_close(metrics["mismatch_ratio"], float64(1.5, 0.5, 1.1, 1.5, 0.5, 1.1), rtol=0, atol=1e-6)
    assert metrics["sampler_kl"].min() > 0


def test_the_policy_before_the_update_can_be_interpolated_by_age() -> None:
    """Fresh: the ratio is to the sampler, with weight 1. Three versions old: ratio 16^(1/4) = 2, weight 16^(3/4) = 8."""
    logprobs = float64(0.32, 0.32).log().requires_grad_()
    rollout = float64(0.02, 0.02).log()
    tokens = batch(float64(-1, -1), rollout, staleness=float64(0, 3))
    torch.testing.assert_close(interpolated_logprobs(logprobs.detach(), tokens).exp(), float64(0.02, 0.16))
    loss, _ = policy_loss(logprobs, tokens, proximal="interpolated", correction={"cap": 100.0})
    assert loss.item() == pytest.approx(16 * 1 + 2 * 8, abs=1e-6)
    loss.backward()  # of the ratio alone: neither the weight nor the proximal policy has one
    torch.testing.assert_close(logprobs.grad, float64(16, 16), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="carry their staleness"):
        policy_loss(logprobs, batch(float64(1, 1), rollout), proximal="interpolated")


def test_kl_to_the_base_by_hand() -> None:
    logprobs, ref = float64(0.5, 0.2).log(), float64(0.25, 0.2).log()
    tokens = batch(float64(0, 0), logprobs, ref_logprobs=ref)
    loss, metrics = policy_loss(logprobs, tokens, kl_coef=0.1)
    # ref / policy = 0.5: 0.5 - log(0.5) - 1 = 0.1931472
    torch.testing.assert_close(metrics["kl_ref"], float64(0.1931472, 0), rtol=0, atol=1e-6)
    assert loss.item() == pytest.approx(0.01931472, abs=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradient_of_the_kl_term_is_that_of_the_kl(estimator: Any) -> None:
    logits = float64(0.3, -0.2, 0.9).requires_grad_()
    ref = float64(0.2, 0.3, 0.5).log()
    policy = logits.log_softmax(0)
    probabilities = policy.exp().detach()  # as loss_weights, they turn the sum into the expectation over all tokens
    tokens = batch(torch.zeros_like(ref), policy.detach(), ref_logprobs=ref, loss_weights=probabilities)
    loss, _ = policy_loss(policy, tokens, kl_coef=1.0, kl_estimator=estimator)
    (ours,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (exact,) = torch.autograd.grad((policy.exp() * (policy - ref)).sum(), logits)
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-9)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator: Any) -> None:
    policy, ref = float64(0.6, 0.3, 0.1), float64(0.2, 0.3, 0.5)
    exact = (policy * (policy / ref).log()).sum()
    found = (policy * kl_penalty(policy.log(), policy.log(), ref.log(), estimator)).sum()
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)


def test_k2_by_hand() -> None:
    found = kl_penalty(float64(-1.0), float64(-2.0), float64(-4.0), "k2")
    assert found.item() == pytest.approx(4.5, abs=1e-12)  # (3)^2 / 2


TWO_SAMPLES = torch.tensor([0, 0, 0, 1, 1, 1])


def test_sequence_clipped_by_hand() -> None:
    tokens = batch(ADVANTAGES, OLD, sample_index=TWO_SAMPLES)
    loss, metrics = sequence_clipped(NEW, OLD, tokens, clip_low=0.05, clip_high=0.2)
    # Both samples: (1.5 * 0.5 * 1.1)^(1/3) = 0.937889; A > 0: as it is; A < 0: clipped to 0.95
    torch.testing.assert_close(metrics["ratio"], torch.full((6,), 0.9378888, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(loss, float64(*[-2 * 0.9378888] * 3, *[0.95] * 3), rtol=0, atol=1e-6)
    assert metrics["clip_frac_low"].tolist() == [0, 0, 0, 1, 1, 1]
    assert not metrics["clip_frac_high"].any()


def test_clipped_weight_by_hand() -> None:
    logprobs = NEW.clone().requires_grad_()
    loss, metrics = clipped_weight(logprobs, OLD, batch(ADVANTAGES, OLD), clip_low=0.4, clip_high=0.2)
    loss.sum().backward()
    # d(-w * A * logprob) / d(logprob) = -w * A, also where w = clip(1.5, 0.5, 1.1) was clipped, to 1.2 and 0.6
    torch.testing.assert_close(logprobs.grad, float64(-2.4, -1.2, -2.2, 1.2, 0.6, 1.1), rtol=0, atol=1e-6)
    assert metrics["clip_frac_low"].tolist() == [0, 1, 0, 0, 1, 0]
    assert metrics["clip_frac_high"].tolist() == [1, 0, 0, 1, 0, 0]


def test_geometric_clipped_by_hand() -> None:
    tokens = batch(ADVANTAGES, OLD, sample_index=TWO_SAMPLES)
    loss, metrics = geometric_clipped(NEW, OLD, tokens, clip_low=0.4, clip_high=0.3)
    # A > 0: 1.5 -> e^0.3, 0.5 and 1.1 stay: (1.3498588 * 0.55)^(1/3); A < 0: 0.5 -> e^-0.4: (1.5 * 0.67032 * 1.1)^(1/3)
    first, second = (1.3498588 * 0.55) ** (1 / 3), (1.5 * 0.6703200 * 1.1) ** (1 / 3)
    torch.testing.assert_close(loss, float64(*[-2 * first] * 3, *[second] * 3), rtol=0, atol=1e-6)
    assert metrics["clip_frac_low"].tolist() == [0, 0, 0, 0, 1, 0]
    assert metrics["clip_frac_high"].tolist() == [1, 0, 0, 0, 0, 0]


def test_kl_without_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="ref_logprobs"):
        policy_loss(NEW, batch(ADVANTAGES, OLD), kl_coef=0.1)


def test_microbatches_add_up_and_the_bound_loss_is_picklable() -> None:
    loss = pickle.loads(pickle.dumps(partial(policy_loss, surrogate=partial(clipped, clip_high=0.28))))
    weights = float64(0.1, 0.1, 0.25, 0.25, 0.5, 0.5)
    whole = loss(NEW, batch(ADVANTAGES, OLD, old_logprobs=OLD, loss_weights=weights))[0]
    parts = [
        loss(NEW[cut], batch(ADVANTAGES[cut], OLD[cut], old_logprobs=OLD[cut], loss_weights=weights[cut]))[0]
        for cut in (slice(0, 2), slice(2, 6))
    ]
    torch.testing.assert_close(sum(parts), whole)


SURROGATES = [clipped, partial(sequence_clipped, clip_low=0.1, clip_high=0.1), geometric_clipped]


@pytest.mark.parametrize("with_old", [True, False])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_gradient_against_finite_differences(surrogate: Surrogate, with_old: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs, old, rollout, ref, advantages = (
        0.4 * torch.randn(64, generator=generator, dtype=torch.float64) for _ in range(5)
    )
    sample_index = torch.arange(64) // 8
    advantages = advantages[sample_index]
    weights = torch.rand(64, generator=generator, dtype=torch.float64)

    def loss_at(at: Tensor, old_logprobs: Tensor | None) -> Tensor:
        fields = {"ref_logprobs": ref, "loss_weights": weights, "sample_index": sample_index}
        tokens = batch(advantages, rollout, old_logprobs=old_logprobs, **fields)
        return policy_loss(at, tokens, surrogate=surrogate, kl_coef=0.3)[0]

    at = logprobs.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_at(at, old if with_old else None), at)
    # Without old_logprobs the loss detaches its own argument: the function to differentiate holds them still.
    held = old if with_old else logprobs
    step = 1e-6 * torch.eye(64, dtype=torch.float64)
    numeric = torch.stack([loss_at(logprobs + e, held) - loss_at(logprobs - e, held) for e in step]) / 2e-6
    torch.testing.assert_close(gradient, numeric, rtol=0, atol=1e-8)


# --- TRL as the oracle -----------------------------------------------------------------------------------------------

GROUP, PROMPT_LENGTHS, COMPLETION_LENGTHS = 4, (3, 3, 3, 3, 5, 5, 5, 5), (6, 2, 4, 6, 1, 5, 3, 6)
REWARDS = (1.0, 0.0, 0.25, 0.5, 0.0, 0.0, 1.0, 0.0)
CLIP = {"clip_low": 0.1, "clip_high": 0.15}
TRUNCATED = {"level": "token", "bound": "truncate", "cap": 1.2}
VOCABULARY = 32


@pytest.fixture(scope="module")
def build_trl(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function (loss_type, beta, more settings) -> TRL's GRPOTrainer on a tiny random Llama with a random LoRA adapter."""
    trl = pytest.importorskip("trl")
    import peft
    import transformers
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2")
    llama = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )

    def build(loss_type: str, beta: float = 0.0, correction: dict[str, Any] = TRUNCATED, **extra: Any) -> Any:
        torch.manual_seed(0)
        is_gmpo = loss_type == "gmpo"
        args = (GMPOConfig if is_gmpo else trl.GRPOConfig)(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            per_device_train_batch_size=2 * GROUP,
            num_generations=GROUP,
            max_completion_length=max(COMPLETION_LENGTHS),
            loss_type="grpo" if is_gmpo else loss_type,
            beta=beta,
            vllm_importance_sampling_mode=f"{correction['level']}_{correction['bound']}",
            vllm_importance_sampling_clip_max=correction["cap"],
            vllm_importance_sampling_clip_min=correction.get("floor"),
            **{"epsilon": CLIP["clip_low"], "epsilon_high": CLIP["clip_high"], **extra},
        )
        trainer = (GMPOTrainer if is_gmpo else trl.GRPOTrainer)(
            transformers.LlamaForCausalLM(llama),
            reward_funcs=lambda completions, **_: list(REWARDS),
            args=args,
            train_dataset=Dataset.from_dict({"prompt": ["w3"] * 2}),
            processing_class=tokenizer,
            peft_config=peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
        )
        trainer.current_gradient_accumulation_steps = 1  # Trainer sets it in its loop
        trainer.use_vllm = True  # after the constructor, so that no engine starts: only the correction is wanted
        trainer.model.train()
        return trainer

    return build


def trl_batch(trainer: Any, *, moved: bool) -> dict[str, Any]:
    """What TRL makes of given completions: padded tensors, advantages, old logprobs, truncated weights."""
    random = np.random.default_rng(0)
    prompts = [random.integers(3, VOCABULARY, n).tolist() for n in PROMPT_LENGTHS]
    completions = [random.integers(3, VOCABULARY, n).tolist() for n in COMPLETION_LENGTHS]
    sampled = [(-np.log(VOCABULARY) + random.normal(0, 0.4, n)).tolist() for n in COMPLETION_LENGTHS]
    trainer._generate = lambda _: (prompts, completions, None, [""] * len(prompts), sampled, {}, None, None)
    inputs: dict[str, Any] = trainer._generate_and_score_completions([{"prompt": "w3"}] * len(prompts))
    if moved:  # the policy moves on, so that it differs from the one before the update
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.data += 0.15 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    else:
        inputs["old_per_token_logps"] = None
    return inputs


def our_loss(trainer: Any, inputs: dict[str, Any], weights: Any, **settings: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The same loss from the same model, on the flat tokens that carry loss."""
    settings = {"surrogate": partial(clipped, **CLIP), "correction": TRUNCATED, **settings}
    mask = inputs["completion_mask"].bool()
    logprobs, _, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model,
        torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
        mask.shape[1],
    )

    def per_token(values: np.ndarray[Any, np.dtype[np.float64]]) -> Tensor:
        return torch.tensor(np.repeat(values, COMPLETION_LENGTHS), dtype=torch.float32)

    advantages = np.concatenate([group_normalised(REWARDS[:GROUP]), group_normalised(REWARDS[GROUP:])])
    old, ref = inputs["old_per_token_logps"], inputs.get("ref_per_token_logps")
    tokens = batch(
        per_token(advantages),
        inputs["sampling_per_token_logps"][mask],
        loss_weights=per_token(weights(COMPLETION_LENGTHS)),
        old_logprobs=None if old is None else old[mask],
        ref_logprobs=None if ref is None else ref[mask],
        sample_index=torch.repeat_interleave(torch.arange(len(mask)), mask.sum(1)),
    )
    return policy_loss(logprobs[mask], tokens, **settings)


def gradients(trainer: Any, loss: Tensor) -> Tensor:
    trainable = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, trainable)])


def assert_equals_trl(trainer: Any, weights: Any, *, moved: bool, **settings: Any) -> dict[str, Tensor]:
    """Loss and gradient; -> our metrics."""
    inputs = trl_batch(trainer, moved=moved)
    theirs = trainer._compute_loss(trainer.model, inputs)
    ours, metrics = our_loss(trainer, inputs, weights, **settings)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradients(trainer, ours), gradients(trainer, theirs), rtol=0, atol=1e-5)
    return metrics


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("moved", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.2])
@pytest.mark.parametrize(
    ("loss_type", "weights"), [("grpo", sequence_weights), ("bnpo", token_weights), ("dapo", token_weights)]
)
def test_equals_trl(build_trl: Any, loss_type: str, weights: Any, beta: float, moved: bool) -> None:
    trainer = build_trl(loss_type, beta)
    metrics = assert_equals_trl(trainer, weights, moved=moved, kl_coef=beta)
    assert (metrics["mismatch_ratio"] > TRUNCATED["cap"]).any()
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert metrics["clip_frac_low"].mean().item() == pytest.approx(logged["clip_ratio/low_mean"], abs=1e-6)
    assert metrics["clip_frac_high"].mean().item() == pytest.approx(logged["clip_ratio/high_mean"], abs=1e-6)
    assert (metrics["clip_frac_low"].any() and metrics["clip_frac_high"].any()) == moved
    if beta:
        assert (metrics["ratio"] * metrics["kl_ref"]).mean().item() == pytest.approx(logged["kl"], abs=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("loss_type", "weights", "surrogate", "extra"),
    [
        ("dr_grpo", partial(constant_weights, max_tokens=max(COMPLETION_LENGTHS)), partial(clipped, **CLIP), {}),
        ("cispo", token_weights, partial(clipped_weight, clip_low=1.0, clip_high=0.15), {"epsilon_high": 1.15}),
        (
            "grpo",
            sequence_weights,
            partial(sequence_clipped, clip_low=0.02, clip_high=0.03),
            {"importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.03},
        ),
    ],
    ids=["dr_grpo", "cispo", "gspo"],
)
def test_the_family_equals_trl(build_trl: Any, loss_type: str, weights: Any, surrogate: Surrogate, extra: Any) -> None:
    metrics = assert_equals_trl(build_trl(loss_type, **extra), weights, moved=True, surrogate=surrogate)
    assert metrics["clip_frac_high"].any()


@pytest.mark.filterwarnings("ignore")
def test_the_geometric_mean_equals_trl(build_trl: Any) -> None:
    trainer = build_trl("gmpo", epsilon=0.1, epsilon_high=0.05)
    surrogate = partial(geometric_clipped, clip_low=0.1, clip_high=0.05)
    uncorrected = {"bound": "none"}  # as TRL's trainer
    metrics = assert_equals_trl(trainer, sequence_weights, moved=True, surrogate=surrogate, correction=uncorrected)
    assert metrics["clip_frac_low"].any()
    assert metrics["clip_frac_high"].any()


@pytest.mark.filterwarnings("ignore")
def test_the_example_of_ones_own_surrogate_equals_trl(build_trl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples" / "custom_loss")
    surrogate = partial(load_object("my_loss:soft_gate"), clip_low=1.05, clip_high=0.9)
    trainer = build_trl("sapo", sapo_temperature_neg=1.05, sapo_temperature_pos=0.9)
    assert_equals_trl(trainer, sequence_weights, moved=True, surrogate=surrogate)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("bound", [{"bound": "truncate", "cap": 1.2}, {"bound": "mask", "floor": 0.7, "cap": 1.4}])
def test_corrections_equal_trl(build_trl: Any, level: str, bound: dict[str, Any]) -> None:
    correction = {"level": level, **bound}
    assert_equals_trl(build_trl("dapo", correction=correction), token_weights, moved=True, correction=correction)


@pytest.mark.filterwarnings("ignore")
def test_advantages_equal_trl(build_trl: Any) -> None:
    theirs = trl_batch(build_trl("grpo"), moved=False)["advantages"]
    ours = np.concatenate([group_normalised(REWARDS[:GROUP]), group_normalised(REWARDS[GROUP:])])
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


VALUES = float64(0.5, 0.5, -1.0, 2.0)
RETURNS = float64(1.0, 0.0, -1.0, 1.0)
OLD_VALUES = float64(0.0, 0.4, -0.5, 1.9)


def value_batch(**fields: Tensor | None) -> TokenBatch:
    weights = float64(0.1, 0.2, 0.3, 0.4)
    return batch(torch.zeros_like(VALUES), torch.zeros_like(VALUES), loss_weights=weights, entropy=None, **fields)


def test_value_loss_by_hand() -> None:
    loss, metrics = value_loss(VALUES, value_batch(returns=RETURNS))
    assert loss.item() == pytest.approx((0.1 * 0.25 + 0.2 * 0.25 + 0 + 0.4 * 1) / 2, abs=1e-12)
    assert metrics.keys() == {"value"}


def test_value_loss_holds_values_near_the_old_ones() -> None:
    loss, metrics = value_loss(VALUES, value_batch(returns=RETURNS, old_values=OLD_VALUES), clip=0.2)
    # Held: 0.2, 0.5, -0.7, 2.0. Their squares: 0.64 (more than 0.25), 0.25, 0.09 (more than 0), 1.
    assert loss.item() == pytest.approx((0.1 * 0.64 + 0.2 * 0.25 + 0.3 * 0.09 + 0.4 * 1) / 2, abs=1e-12)
    assert metrics["value_clip_frac"].tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_loss_gradient_by_finite_differences(clip: float | None) -> None:
    tokens = value_batch(returns=RETURNS, old_values=OLD_VALUES)
    values = (VALUES + 0.01).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: value_loss(v, tokens, clip=clip)[0], values)


def test_value_loss_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match="returns"):
        value_loss(VALUES, value_batch(old_values=OLD_VALUES))
    with pytest.raises(ValueError, match="old_values"):
        value_loss(VALUES, value_batch(returns=RETURNS), clip=0.2)


def test_update_kl_is_of_the_old_policy_to_the_new_one() -> None:
    _, metrics = policy_loss(NEW, batch(ADVANTAGES, OLD, old_logprobs=OLD))
    ratio = (NEW - OLD).exp()
    torch.testing.assert_close(metrics["update_kl"], ratio - 1 - ratio.log())
    assert "update_kl" not in policy_loss(NEW, batch(ADVANTAGES, OLD))[1]


@pytest.mark.parametrize(("estimator", "expected"), [("k1", 2 * np.log(2)), ("k3", 2 * 0.1931472)])
def test_the_penalty_has_the_ratio_of_the_surrogate(estimator: Any, expected: float) -> None:
    """To the policy that sampled where that is the proximal one: then its gradient is right for stale samples, too."""
    logprobs, rollout, ref = float64(0.5).log(), float64(0.25).log(), float64(0.25).log()
    tokens = batch(float64(0), rollout, ref_logprobs=ref)
    loss, _ = policy_loss(logprobs, tokens, proximal="rollout", kl_coef=0.1, kl_estimator=estimator)
    assert loss.item() == pytest.approx(0.1 * expected, abs=1e-6)
