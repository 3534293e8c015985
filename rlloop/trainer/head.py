"""Log-probabilities of chosen tokens straight from hidden states, without the [tokens, vocabulary] logits.

Under LoRA the head is frozen, so the one gradient that is needed is that of the hidden states, and for one token it is

    d logprob / d hidden = (onehot(target) - softmax(logits)) @ W / temperature

known up to the incoming factor d loss / d logprob. The forward pass computes it chunk by chunk while the chunk's logits
are there, keeps it as [N, H], and the backward pass multiplies. Two matrix products a chunk, nothing is recomputed.

Shapes: N tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from rlloop.errors import TrainerError
from rlloop.trainer.compiling import on_device

_ROWS_PER_PRODUCT = {"cpu": 256, "cuda": 4096}
_ROWS_PER_SOFTMAX = 8  # on a CPU: the fp32 rows stay in the cache


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, group: ProcessGroup | None
    ) -> tuple[Tensor, Tensor]:
        needs_grad = ctx.needs_input_grad[0]
        logprobs = torch.empty(len(hidden), device=hidden.device)
        entropy = torch.empty_like(logprobs)
        direction = torch.empty_like(hidden) if needs_grad else None
        whole_on_cpu = group is None and hidden.device.type == "cpu"
        fill = _softmax_rows if whole_on_cpu else partial(_softmax_shard, group=group)
        num_pieces = -(-len(hidden) // _ROWS_PER_PRODUCT[hidden.device.type])
        rows_per_piece = -(-len(hidden) // max(num_pieces, 1))  # pieces of one size: one compiled shape
        for start in range(0, len(hidden), rows_per_piece or 1):
            rows = slice(start, start + rows_per_piece)
            logits = hidden[rows] @ weight.t()
            logits = fill(logits, targets[rows], temperature, logprobs[rows], entropy[rows], needs_grad)
            if direction is not None:
                torch.mm(logits, weight, out=direction[rows])
        ctx.save_for_backward(direction)
        ctx.group = group
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, d_logprobs: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        (direction,) = ctx.saved_tensors
        d_hidden = direction * d_logprobs[:, None].to(direction.dtype)
        if ctx.group is not None:  # each rank has its part of the vocabulary
            dist.all_reduce(d_hidden, group=ctx.group)
        return d_hidden, None, None, None, None


def _softmax_rows(
    logits: Tensor, targets: Tensor, temperature: float, logprobs: Tensor, entropy: Tensor, needs_grad: bool
) -> Tensor:
    """Fill `logprobs` and `entropy` [N]; with `needs_grad`, overwrite `logits` [N, V] with d logprob / d logits."""
    for start in range(0, len(logits), _ROWS_PER_SOFTMAX):
        rows = slice(start, start + _ROWS_PER_SOFTMAX)
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
    return logits


def _softmax_shard(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    logprobs: Tensor,
    entropy: Tensor,
    needs_grad: bool,
    *,
    group: ProcessGroup | None,
) -> Tensor:
    """As `_softmax_rows`, in two passes over `logits` [N, V / ranks]; -> with `needs_grad`, d logprob / d logits. `targets` count
    from this rank's first column; those of other ranks are out of range."""
    log_sum, chosen = on_device(_log_sum_exp, logits)(logits, targets, 1 / temperature)
    if group is not None:
        largest = log_sum.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        sums = torch.stack([(log_sum - largest).exp(), chosen])
        dist.all_reduce(sums, group=group)
        log_sum, chosen = largest + sums[0].log(), sums[1]
    gradient = logits
    if needs_grad:
        gradient, mean_logit = on_device(_softmax_gradient, logits)(logits, targets, log_sum, 1 / temperature)
    else:
        mean_logit = on_device(_mean_logit, logits)(logits, log_sum, 1 / temperature)
    if group is not None:
        dist.all_reduce(mean_logit, group=group)
    logprobs.copy_(chosen - log_sum)
    entropy.copy_(log_sum - mean_logit)
    return gradient


def _log_sum_exp(logits: Tensor, targets: Tensor, inverse_temperature: float) -> tuple[Tensor, Tensor]:
    """-> log of the sum of exponentials, and the target's logit or 0: [N] fp32."""
    scaled = logits.float() * inverse_temperature
    here = (targets >= 0) & (targets < logits.shape[-1])
    chosen = scaled.gather(-1, targets.clamp(0, logits.shape[-1] - 1)[:, None])[:, 0]
    return scaled.logsumexp(-1), torch.where(here, chosen, 0.0)


def _softmax_gradient(
    logits: Tensor, targets: Tensor, log_sum: Tensor, inverse_temperature: float
) -> tuple[Tensor, Tensor]:
    """-> d logprob / d logits in the logits' dtype, and this rank's share of the mean logit [N]."""
    scaled = logits.float() * inverse_temperature
    p = (scaled - log_sum[:, None]).exp()
    chosen = torch.arange(logits.shape[-1], device=logits.device) == targets[:, None]
    return ((chosen.float() - p) * inverse_temperature).to(logits.dtype), (p * scaled).sum(-1)


def _mean_logit(logits: Tensor, log_sum: Tensor, inverse_temperature: float) -> Tensor:
    """-> this rank's share of the mean logit [N]."""
    scaled = logits.float() * inverse_temperature
    return ((scaled - log_sum[:, None]).exp() * scaled).sum(-1)


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, group: ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of its distribution, both [N] in fp32; the entropy has no gradient.

    hidden [N, H] and weight [V, H] (frozen) in one dtype, targets [N]. The distribution is softmax(logits / temperature).
    Hand over the tokens that the loss uses and no others. `group`: the ranks among which the rows of `weight` are divided
    in equal parts, in order; each calls this with the same hidden states and targets, and gets the same result.

    Raises ValueError when the head is trainable: it gets no gradient.
    """
    if weight.requires_grad:
        raise ValueError("token_logprobs gives the head no gradient; freeze it")
    if group is not None:
        targets = targets - group.rank() * len(weight)
    logprobs, entropy = _TokenLogprobs.apply(hidden, weight, targets, temperature, group)
    return logprobs, entropy


def token_values(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A value head: hidden [N, H], weight [1, H] and bias [1] in fp32 -> [N] in fp32."""
    return hidden.float().mv(weight[0]) + bias


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
    hidden = getattr(model.get_decoder()(input_ids=tokens, use_cache=False), "last_hidden_state", None)
    if hidden is None:
        raise TrainerError(
            f"{name}: expected a decoder that returns hidden states, as transformers' do, got another one"
        )
    product = hidden @ head.weight.t()
    if not torch.allclose(logits, product, rtol=1e-2, atol=float(product.abs().max()) * 1e-3):
        raise TrainerError(
            f"{name}: its logits are not hidden states times the head's matrix (softcapping or a scale?), "
            "which the trainer does not support"
        )
    return head.weight
