"""Megatron's transformer layer for packed rows: its modules and parameters, fewer and larger kernels.

`FastLayer` computes dense layers with RMSNorm, SwiGLU and rotary embeddings (Llama, Qwen2, Qwen3, Mistral). Its modules are
Megatron's, so loading, exporting, sharding and pipelines do not notice it; only `forward` differs. What lies between two
matrix products is one small function, compiled once for all layers on a GPU; the products and their adapters are one
autograd function (`lora`); rotary angles come per token, once for all layers; attention is one call.

Models that it does not fit keep Megatron's layer, with the same linear layers, attention and angles (`model`).

Shapes: T tokens of the row (T / ranks of them between layers under sequence parallelism), C hidden size, F intermediate
size, H / K query / key-value heads of this rank, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlloop.errors import TrainerError
from rlloop.trainer.attention import PackedLayout
from rlloop.trainer.compiling import on_device
from rlloop.trainer.flash import FlashLayout
from rlloop.trainer.megatron import compat  # noqa: F401  (before anything under megatron)

from megatron.core.packed_seq_params import PackedSeqParams  # isort: skip
from megatron.core.transformer.module import MegatronModule  # isort: skip
from megatron.core.transformer.transformer_layer import TransformerLayer  # isort: skip
from megatron.core.utils import make_viewless_tensor  # isort: skip


class Row(PackedSeqParams):
    """A packed microbatch as Megatron hands it down to its layers."""

    def __init__(self, layout: PackedLayout | FlashLayout, positions: Tensor, num_positions: int) -> None:
        # Megatron's own rotary code takes the row for one sequence, whose angles `rotate_by_token` has put in order. On
        # the CPU, for it reads the ends back.
        ends = torch.tensor([0, len(positions)], dtype=torch.int32)
        super().__init__(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            cu_seqlens_q_padded=ends,
            cu_seqlens_kv_padded=ends,
            max_seqlen_q=num_positions,
            max_seqlen_kv=num_positions,
        )
        self.layout = layout
        self.positions = positions
        self.rotation: tuple[Tensor, Tensor] | None = None
        """cos and sin [T, D / 2] of each token, once a layer has asked for them."""


class PackedAttention(MegatronModule):
    """Core attention: query [T, H, D], key and value [T, K, D] -> [T, H * D]."""

    def __init__(self, config: Any, *args: Any, softmax_scale: float | None = None, **kwargs: Any) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or config.kv_channels**-0.5
        self.window: int | None = None
        """Tokens of a sliding window, which `build_model` reads from the Hugging Face config."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, packed_seq_params: Row, **kwargs: Any
    ) -> Tensor:
        """The other arguments (masks) say what the row's layout says already.

        Raises TrainerError for a sliding window shorter than the row.
        """
        if self.window is not None and self.window < len(query):
            raise TrainerError(
                f"the model has a sliding window of {self.window} tokens; packed attention supports it only for microbatches "
                f"that are shorter, got {len(query)}: lower trainer.max_tokens_per_microbatch"
            )
        return packed_seq_params.layout.attend(query, key, value, self.scale).flatten(1)


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang & Sennrich 2019). Megatron's refuses sequence parallelism without Transformer Engine."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]"""
        return on_device(norm, x)(x, self.weight, self.eps)


def rotate_by_token(rotary: nn.Module) -> None:
    """Make a rotary embedding return the angles of each token of the row, not those of positions 0, 1, ... .

    Megatron's own way to packed rows is some 97 operations for each sequence, layer and tensor, and it waits for the device.
    """

    def pick(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        module.angles = output  # a CUDA graph must keep them alive: Megatron's cache forgets
        positions = module.row_positions
        if isinstance(output, tuple):  # YaRN: angles and a scale
            return output[0][positions], *output[1:]
        return output[positions]

    rotary.register_forward_hook(pick)


def run_body(chunk: Any, tokens: Tensor, row: Row) -> Tensor:
    """All of a chunk but the head: -> hidden states [T, 1, C]."""
    chunk.rotary_pos_emb.row_positions = row.positions
    hidden: Tensor = chunk(
        input_ids=tokens[None],
        position_ids=row.positions[None],
        attention_mask=None,
        packed_seq_params=row,
        output_processor=lambda hidden_states, **others: hidden_states,
    )
    return hidden


class FastLayer(TransformerLayer):
    """See the module."""

    def forward(
        self, hidden_states: Tensor, *args: Any, rotary_pos_emb: Tensor, packed_seq_params: Row, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """[T, 1, C] -> [T, 1, C]; the other arguments are for other kinds of model."""
        attention, mlp, row = self.self_attention, self.mlp, packed_seq_params
        if row.rotation is None:
            angles = rotary_pos_emb[:, 0, 0, : rotary_pos_emb.shape[-1] // 2]
            row.rotation = angles.cos(), angles.sin()
        eps = self.config.layernorm_epsilon
        x = hidden_states[:, 0]
        x, normed = _Norm.apply(x, None, self.input_layernorm.weight, eps)
        fused = attention.linear_qkv.product(normed)
        grouped = fused.view(len(fused), attention.num_query_groups_per_partition, -1, self.config.kv_channels)
        norms = [getattr(module, "weight", None) for module in (attention.q_layernorm, attention.k_layernorm)]
        if norms == [None, None]:
            query, key, value = _SplitAndRotate.apply(grouped, *row.rotation)
        else:
            query, key, value = on_device(split_and_rotate, x)(grouped, *row.rotation, *norms, eps)
        attended = attention.core_attention(query, key, value, packed_seq_params=row)
        x, normed = _Norm.apply(x, attention.linear_proj.product(attended), self.pre_mlp_layernorm.weight, eps)
        x = x + mlp.linear_fc2.product(_SwiGLU.apply(mlp.linear_fc1.product(normed)))
        # A pipeline stage frees what it has sent, which Megatron refuses to do to a view.
        out = make_viewless_tensor(inp=x[:, None], requires_grad=x.requires_grad, keep_graph=True)
        return out, None


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dimension, in fp32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def add_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y, and its norm."""
    total = x + y
    return total, norm(total, weight, eps)


def norm_backward(d_total: Tensor, d_normed: Tensor, total: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The gradient of the norm's input, and of the residual beside it."""
    wide, d_unit = total.float(), (d_normed * weight).float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    unit = wide * scale
    d_input = scale * (d_unit - unit * (d_unit * unit).mean(-1, keepdim=True))
    return (d_total.float() + d_input).to(total.dtype)


def split_and_rotate(
    grouped: Tensor, cos: Tensor, sin: Tensor, query_weight: Tensor | None, key_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Megatron's [T, K, H / K + 2, D] -> query [T, H, D], key and value [T, K, D]; the weights are those of their norms."""
    query, key, value = grouped[:, :, :-2].flatten(1, 2), grouped[:, :, -2], grouped[:, :, -1]
    if query_weight is not None and key_weight is not None:
        query, key = norm(query, query_weight, eps), norm(key, key_weight, eps)
    return _rotate(query, cos, sin), _rotate(key, cos, sin), value.contiguous()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021) of [T, heads, D] by [T, half of what is rotated], the rest untouched."""
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    first, second, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    return torch.cat([(first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype), rest], dim=-1)


def rotate_back(d_query: Tensor, d_key: Tensor, cos: Tensor, sin: Tensor, *halves: Tensor) -> None:
    """The gradients of what `_rotate` took, into their halves: query's first and second, key's first and second.

    Both at once: for shapes that take turns torch compiles what takes any shape, keeps it on disk, and finds it again for another
    model, though the sizes of the buffer that the halves lie in are compiled in.
    """
    half = cos.shape[-1]
    for d_rotated, d_first, d_second in ((d_query, *halves[:2]), (d_key, *halves[2:])):
        shape = (-1, *[1] * (d_rotated.dim() - 2), half)
        cosines, sines = cos.view(shape), sin.view(shape)
        first, second = d_rotated[..., :half].float(), d_rotated[..., half : 2 * half].float()
        d_first.copy_(first * cosines + second * sines)
        d_second.copy_(second * cosines - first * sines)


def swiglu(x: Tensor) -> Tensor:
    """[T, 2F], gate and up, -> [T, F] (Shazeer 2020)."""
    gate, up = x.chunk(2, dim=-1)
    return (F.silu(gate.float()) * up).to(x.dtype)


def swiglu_backward(dy: Tensor, x: Tensor, d_gate: Tensor, d_up: Tensor) -> None:
    """Into the halves of dx, given as two tensors: a kernel that writes one, or joins them with `cat`, is up to twice as slow."""
    gate, up = x.float().chunk(2, dim=-1)
    wide = dy.float()
    sigmoid = gate.sigmoid()
    d_gate.copy_(wide * up * sigmoid * (1 + gate * (1 - sigmoid)))
    d_up.copy_(wide * gate * sigmoid)


class _Norm(torch.autograd.Function):
    """x, y [T, C] -> x + y (x, where there is no y), and its norm; the norm's weight is frozen. Autograd would add up the
    gradients of the two in passes of their own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if y is None:
            total, normed = x, on_device(norm, x)(x, weight, eps)
        else:
            total, normed = on_device(add_norm, x)(x, y, weight, eps)
        ctx.save_for_backward(total, weight)
        ctx.eps, ctx.is_sum = eps, y is not None
        return total, normed

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, d_normed: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        total, weight = ctx.saved_tensors
        dx = on_device(norm_backward, total)(d_total, d_normed, total, weight, ctx.eps)
        return dx, dx if ctx.is_sum else None, None, None


class _SplitAndRotate(torch.autograd.Function):
    """`split_and_rotate` without norms; autograd would put the gradient together from zeros and sums."""

    @staticmethod
    def forward(ctx: Any, grouped: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return on_device(split_and_rotate, grouped)(grouped, cos, sin, None, None, 0.0)

    @staticmethod
    def backward(ctx: Any, d_query: Tensor, d_key: Tensor, d_value: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        half = cos.shape[-1]
        num_tokens, num_groups, head_size = d_key.shape
        d_query = d_query.reshape(num_tokens, num_groups, -1, head_size)
        d_grouped = d_query.new_empty(num_tokens, num_groups, d_query.shape[2] + 2, head_size)
        targets = d_grouped[:, :, :-2], d_grouped[:, :, -2]
        halves = [part for target in targets for part in (target[..., :half], target[..., half : 2 * half])]
        on_device(rotate_back, d_query)(d_query, d_key, cos, sin, *halves)
        for d_rotated, target in zip((d_query, d_key), targets, strict=True):
            target[..., 2 * half :].copy_(d_rotated[..., 2 * half :])
        d_grouped[:, :, -1].copy_(d_value)
        return d_grouped, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return on_device(swiglu, x)(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        on_device(swiglu_backward, x)(dy, x, *dx.chunk(2, dim=-1))
        return dx
