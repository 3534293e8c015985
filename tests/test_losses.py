"""The clipped surrogate against hand-computed numbers, finite differences, and TRL's own GRPOTrainer."""

from __future__ import annotations

import pickle
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlloop.advantages import group_normalised, sequence_weights, token_weights
from rlloop.losses import clipped_surrogate, kl_k3
from rlloop.trainer import TokenBatch


def float64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def batch(advantages: Tensor, rollout_logprobs: Tensor, **fields: Tensor | None) -> TokenBatch:
    defaults: dict[str, Any] = {
        "loss_weights": torch.ones_like(advantages),
        "old_logprobs": None,
        "ref_logprobs": None,
        "entropy": torch.zeros_like(advantages),
    }
    return TokenBatch(advantages=advantages, rollout_logprobs=rollout_logprobs, **(defaults | fields))


OLD = float64(0.2, 0.2, 0.2, 0.2, 0.2, 0.2).log()
NEW = float64(0.3, 0.1, 0.22, 0.3, 0.1, 0.22).log()
"""Ratios 1.5, 0.5 and 1.1, once for each sign of the advantage below."""
ADVANTAGES = float64(2, 2, 2, -1, -1, -1)


def test_surrogate_by_hand() -> None:
    tokens = batch(ADVANTAGES, OLD, old_logprobs=OLD)
    loss, metrics = clipped_surrogate(NEW, tokens, clip_low=0.2, clip_high=0.28, tis_cap=2.0)
    # A > 0: ratios 1.28 (clipped), 0.5, 1.1; A < 0: ratios 1.5, 0.8 (clipped), 1.1
    assert loss.item() == pytest.approx(-2 * (1.28 + 0.5 + 1.1) + (1.5 + 0.8 + 1.1), abs=1e-6)
    torch.testing.assert_close(metrics["ratio"], float64(1.5, 0.5, 1.1, 1.5, 0.5, 1.1), rtol=0, atol=1e-6)
    assert metrics["clip_frac_high"].tolist() == [1, 0, 0, 0, 0, 0]
    assert metrics["clip_frac_low"].tolist() == [0, 0, 0, 0, 1, 0]
    assert "kl_ref" not in metrics


def test_a_clipped_token_has_no_gradient() -> None:
    logprobs = NEW.clone().requires_grad_()
    loss, metrics = clipped_surrogate(logprobs, batch(ADVANTAGES, OLD, old_logprobs=OLD))
    loss.backward()
    # d(-ratio * A) / d(logprob) = -ratio * A where nothing is clipped
    torch.testing.assert_close(logprobs.grad, float64(0, -1.0, -2.2, 1.5, 0, 1.1), rtol=0, atol=1e-6)
    assert not any(metric.requires_grad for metric in metrics.values())


def test_without_old_logprobs_it_is_the_weighted_policy_gradient() -> None:
    logprobs = float64(0.5, 0.5, 0.5).log().requires_grad_()
    rollout = float64(0.5, 0.125, 0.8).log()  # trainer / sampler: 1, 4 and 0.625
    loss, metrics = clipped_surrogate(logprobs, batch(float64(1, 1, -2), rollout), tis_cap=2.0)
    assert loss.item() == pytest.approx(-1 - 2 + 1.25, abs=1e-6)
    torch.testing.assert_close(metrics["mismatch_ratio"], float64(1, 4, 0.625), rtol=0, atol=1e-6)
    torch.testing.assert_close(metrics["sampler_kl"], float64(0, 3 - np.log(4), -0.375 - np.log(0.625)))
    loss.backward()
    torch.testing.assert_close(logprobs.grad, float64(-1, -2, 1.25), rtol=0, atol=1e-6)


def test_kl_to_the_base_by_hand() -> None:
    logprobs, ref = float64(0.5, 0.2).log(), float64(0.25, 0.2).log()
    tokens = batch(float64(0, 0), logprobs, ref_logprobs=ref)
    loss, metrics = clipped_surrogate(logprobs, tokens, kl_coef=0.1)
    # ref / policy = 0.5: 0.5 - log(0.5) - 1 = 0.1931472
    torch.testing.assert_close(metrics["kl_ref"], float64(0.1931472, 0), rtol=0, atol=1e-6)
    assert loss.item() == pytest.approx(0.01931472, abs=1e-6)


def test_gradient_of_the_kl_term_is_that_of_the_kl() -> None:
    logits = float64(0.3, -0.2, 0.9).requires_grad_()
    ref = float64(0.2, 0.3, 0.5).log()
    policy = logits.log_softmax(0)
    probabilities = policy.exp().detach()  # as loss_weights, they turn the sum into the expectation over all tokens
    tokens = batch(torch.zeros_like(ref), policy.detach(), ref_logprobs=ref, loss_weights=probabilities)
    (ours,) = torch.autograd.grad(clipped_surrogate(policy, tokens, kl_coef=1.0)[0], logits, retain_graph=True)
    (exact,) = torch.autograd.grad((policy.exp() * (policy - ref)).sum(), logits)
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-9)


def test_kl_k3_is_unbiased() -> None:
    policy, other = float64(0.6, 0.3, 0.1), float64(0.2, 0.3, 0.5)
    exact = (policy * (policy / other).log()).sum()
    torch.testing.assert_close((policy * kl_k3(policy.log(), other.log())).sum(), exact)


def test_kl_without_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="ref_logprobs"):
        clipped_surrogate(NEW, batch(ADVANTAGES, OLD), kl_coef=0.1)


def test_microbatches_add_up_and_the_bound_loss_is_picklable() -> None:
    loss = pickle.loads(pickle.dumps(partial(clipped_surrogate, clip_high=0.28)))
    weights = float64(0.1, 0.1, 0.25, 0.25, 0.5, 0.5)
    whole = loss(NEW, batch(ADVANTAGES, OLD, old_logprobs=OLD, loss_weights=weights))[0]
    parts = [
        loss(NEW[cut], batch(ADVANTAGES[cut], OLD[cut], old_logprobs=OLD[cut], loss_weights=weights[cut]))[0]
        for cut in (slice(0, 2), slice(2, 6))
    ]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("with_old", [True, False])
def test_gradient_against_finite_differences(with_old: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs, old, rollout, ref, advantages = (
        0.4 * torch.randn(64, generator=generator, dtype=torch.float64) for _ in range(5)
    )
    weights = torch.rand(64, generator=generator, dtype=torch.float64)

    def loss_at(at: Tensor, detached: Tensor) -> Tensor:
        # Without old_logprobs the loss detaches its own argument: the function to differentiate holds them still.
        tokens = batch(
            advantages, rollout, old_logprobs=old if with_old else detached, ref_logprobs=ref, loss_weights=weights
        )
        return clipped_surrogate(at, tokens, kl_coef=0.3)[0]

    at = logprobs.clone().requires_grad_()
    tokens = batch(advantages, rollout, old_logprobs=old if with_old else None, ref_logprobs=ref, loss_weights=weights)
    (gradient,) = torch.autograd.grad(clipped_surrogate(at, tokens, kl_coef=0.3)[0], at)
    step = 1e-6 * torch.eye(64, dtype=torch.float64)
    numeric = torch.stack([loss_at(logprobs + e, logprobs) - loss_at(logprobs - e, logprobs) for e in step]) / 2e-6
    torch.testing.assert_close(gradient, numeric, rtol=0, atol=1e-8)


# --- TRL as the oracle -----------------------------------------------------------------------------------------------

GROUP, PROMPT_LENGTHS, COMPLETION_LENGTHS = 4, (3, 3, 3, 3, 5, 5, 5, 5), (6, 2, 4, 6, 1, 5, 3, 6)
REWARDS = (1.0, 0.0, 0.25, 0.5, 0.0, 0.0, 1.0, 0.0)
SETTINGS = {"clip_low": 0.1, "clip_high": 0.15, "tis_cap": 1.2}
VOCABULARY = 32


@pytest.fixture(scope="module")
def build_trl(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function (loss_type, beta) -> TRL's GRPOTrainer on a tiny random Llama with a random LoRA adapter."""
    trl = pytest.importorskip("trl")
    import peft
    import transformers
    from datasets import Dataset
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2")
    llama = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )

    def build(loss_type: str, beta: float) -> Any:
        torch.manual_seed(0)
        args = trl.GRPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            per_device_train_batch_size=2 * GROUP,
            num_generations=GROUP,
            max_completion_length=max(COMPLETION_LENGTHS),
            loss_type=loss_type,
            beta=beta,
            epsilon=SETTINGS["clip_low"],
            epsilon_high=SETTINGS["clip_high"],
            vllm_importance_sampling_mode="token_truncate",
            vllm_importance_sampling_clip_max=SETTINGS["tis_cap"],
        )
        trainer = trl.GRPOTrainer(
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


def our_loss(trainer: Any, inputs: dict[str, Any], weights: Any, kl_coef: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The same loss from the same model, on the flat tokens that carry loss."""
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
    )
    return clipped_surrogate(logprobs[mask], tokens, **SETTINGS, kl_coef=kl_coef)


def gradients(trainer: Any, loss: Tensor) -> Tensor:
    trainable = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, trainable)])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("moved", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.2])
@pytest.mark.parametrize(
    ("loss_type", "weights"), [("grpo", sequence_weights), ("bnpo", token_weights), ("dapo", token_weights)]
)
def test_equals_trl(build_trl: Any, loss_type: str, weights: Any, beta: float, moved: bool) -> None:
    trainer = build_trl(loss_type, beta)
    inputs = trl_batch(trainer, moved=moved)
    theirs = trainer._compute_loss(trainer.model, inputs)
    ours, metrics = our_loss(trainer, inputs, weights, beta)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradients(trainer, ours), gradients(trainer, theirs), rtol=0, atol=1e-5)

    assert (metrics["mismatch_ratio"] > SETTINGS["tis_cap"]).any()
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert metrics["clip_frac_low"].mean().item() == pytest.approx(logged["clip_ratio/low_mean"], abs=1e-6)
    assert metrics["clip_frac_high"].mean().item() == pytest.approx(logged["clip_ratio/high_mean"], abs=1e-6)
    assert (metrics["clip_frac_low"].any() and metrics["clip_frac_high"].any()) == moved
    if beta:
        assert (metrics["ratio"] * metrics["kl_ref"]).mean().item() == pytest.approx(logged["kl"], abs=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_advantages_equal_trl(build_trl: Any) -> None:
    theirs = trl_batch(build_trl("grpo", 0.0), moved=False)["advantages"]
    ours = np.concatenate([group_normalised(REWARDS[:GROUP]), group_normalised(REWARDS[GROUP:])])
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
