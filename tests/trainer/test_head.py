import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from rlloop.errors import TrainerError
from rlloop.trainer import head
from rlloop.trainer.head import head_weight, token_logprobs


def reference(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    everything = (hidden.float() @ weight.float().t() / temperature).log_softmax(-1)
    return everything.gather(-1, targets[:, None])[:, 0], -(everything.exp() * everything).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(("product_rows", "softmax_rows"), [(7, 3), (64, 64)])
def test_equals_log_softmax(
    monkeypatch: pytest.MonkeyPatch, temperature: float, product_rows: int, softmax_rows: int
) -> None:
    monkeypatch.setitem(head._ROWS_PER_PRODUCT, "cpu", product_rows)
    monkeypatch.setattr(head, "_ROWS_PER_SOFTMAX", softmax_rows)
    torch.manual_seed(0)
    weight, targets, d_logprobs = torch.randn(50, 16), torch.randint(50, (23,)), torch.randn(23)
    hidden = torch.randn(23, 16).requires_grad_()
    logprobs, entropy = token_logprobs(hidden, weight, targets, temperature=temperature)
    (gradient,) = torch.autograd.grad(logprobs, hidden, d_logprobs)
    expected, expected_entropy = reference(hidden, weight, targets, temperature)
    (expected_gradient,) = torch.autograd.grad(expected, hidden, d_logprobs)
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, expected_entropy.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-5)
    assert not entropy.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(token_logprobs(hidden, weight, targets, temperature=temperature)[0], logprobs)


def test_bf16_logprobs_are_fp32_and_close() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 64).bfloat16().requires_grad_(), (torch.randn(200, 64) / 8).bfloat16()
    targets = torch.randint(200, (40,))
    logprobs, _ = token_logprobs(hidden, weight, targets)
    (gradient,) = torch.autograd.grad(logprobs.sum(), hidden)
    exact = hidden.detach().float().requires_grad_()
    expected, _ = reference(exact, weight, targets, 1.0)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), exact)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, expected.detach(), atol=0.02, rtol=0)
    torch.testing.assert_close(gradient.float(), expected_gradient, atol=0.01, rtol=0.02)


def test_a_very_unlikely_token_stays_finite() -> None:
    weight = torch.tensor([[500.0], [-500.0]])
    logprobs, entropy = token_logprobs(torch.ones(1, 1), weight, torch.tensor([1]))
    assert logprobs.item() == -1000
    assert entropy.item() == 0


def test_a_trainable_head_is_refused() -> None:
    with pytest.raises(ValueError, match="freeze"):
        token_logprobs(torch.ones(1, 1), torch.ones(2, 1).requires_grad_(), torch.tensor([0]))


SHAPE = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def test_head_weight_of_a_plain_model() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    assert head_weight(model) is model.lm_head.weight


def test_softcapped_logits_are_refused() -> None:
    config = Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=0.01, attn_implementation="eager")
    with pytest.raises(TrainerError, match=r"Gemma2ForCausalLM.*softcapping"):
        head_weight(Gemma2ForCausalLM(config).eval())


def test_a_biased_head_is_refused() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model.lm_head = torch.nn.Linear(16, 20, bias=True)
    with pytest.raises(TrainerError, match="linear head without a bias"):
        head_weight(model)
