"""Log-probabilities of chosen tokens straight from hidden states, without the [tokens, vocabulary] logits.

Under LoRA the head is frozen, so the one gradient that is needed is that of the hidden states, and for one token it is

    d logprob / d hidden = (onehot(target) - softmax(logits)) @ W / temperature

known up to the incoming factor d loss / d logprob. The forward pass computes it chunk by chunk while the chunk's logits
are there, keeps it as [N, H], and the backward pass multiplies. Two matrix products a chunk, nothing is recomputed.

Shapes: N tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlloop.errors import TrainerError

_ROWS_PER_PRODUCT = {"cpu": 256, "cuda": 2048}
_ROWS_PER_SOFTMAX = {"cpu": 8, "cuda": 2048}  # on a CPU the fp32 rows stay in the cache


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        needs_grad = ctx.needs_input_grad[0]
        logprobs = torch.empty(len(hidden), device=hidden.device)
        entropy = torch.empty_like(logprobs)
        direction = torch.empty_like(hidden) if needs_grad else None
        for start in range(0, len(hidden), _ROWS_PER_PRODUCT[hidden.device.type]):
            rows = slice(start, start + _ROWS_PER_PRODUCT[hidden.device.type])
            logits = hidden[rows] @ weight.t()
            _softmax_rows(logits, targets[rows], temperature, logprobs[rows], entropy[rows], needs_grad)
            if direction is not None:
                torch.mm(logits, weight, out=direction[rows])
        ctx.save_for_backward(direction)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, d_logprobs: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        (direction,) = ctx.saved_tensors
        return direction * d_logprobs[:, None].to(direction.dtype), None, None, None


def _softmax_rows(
    logits: Tensor, targets: Tensor, temperature: float, logprobs: Tensor, entropy: Tensor, needs_grad: bool
) -> None:
    """Fill `logprobs` and `entropy` [N]; with `needs_grad`, overwrite `logits` [N, V] with d logprob / d logits."""
    for start in range(0, len(logits), _ROWS_PER_SOFTMAX[logits.device.type]):
        rows = slice(start, start + _ROWS_PER_SOFTMAX[logits.device.type])
        target = targets[rows, None]
        scaled = logits[rows].float()
        log_p = torch.log_softmax(scaled if temperature == 1.0 else scaled.div_(temperature), dim=-1)
        p = log_p.exp()
        logprobs[rows] = log_p.gather(-1, target)[:, 0]
        entropy[rows] = -torch.bmm(p[:, None, :], log_p[:, :, None])[:, 0, 0]
        if needs_grad:
            # In fp32 up to here: 1 - p of a likely token would lose its digits in bf16.
            gradient = p.neg_().scatter_add_(-1, target, torch.ones_like(target, dtype=p.dtype))
            logits[rows] = gradient if temperature == 1.0 else gradient.div_(temperature)


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of its distribution, both [N] in fp32; the entropy has no gradient.

    hidden [N, H] and weight [V, H] (frozen) in one dtype, targets [N]. The distribution is softmax(logits / temperature).
    Hand over the tokens that the loss uses and no others. Raises ValueError when the head is trainable: it gets no gradient.
    """
    if weight.requires_grad:
        raise ValueError("token_logprobs gives the head no gradient; freeze it")
    logprobs, entropy = _TokenLogprobs.apply(hidden, weight, targets, temperature)
    return logprobs, entropy


@torch.no_grad()
def head_weight(model: nn.Module) -> Tensor:
    """The [V, H] matrix of a transformers causal language model's head.

    Raises TrainerError when logits are more than one matrix product (a bias, softcapping as in Gemma 2, a scale as in
    Cohere and Granite, ...), which is tried out on a few tokens.
    """
    head = model.get_output_embeddings()
    name = type(model).__name__
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise TrainerError(f"{name}: expected a linear head without a bias, got {head}")
    tokens = torch.arange(8, device=head.weight.device)[None] % len(head.weight)
    logits = model(input_ids=tokens, use_cache=False).logits
    product = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state @ head.weight.t()
    if not torch.allclose(logits, product, rtol=1e-2, atol=float(product.abs().max()) * 1e-3):
        raise TrainerError(
            f"{name}: its logits are not hidden states times the head's matrix (softcapping or a scale?), "
            "which the trainer does not support"
        )
    return head.weight
