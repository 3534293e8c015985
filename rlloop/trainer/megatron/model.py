"""From a Hugging Face name and the parallel sizes to a Megatron model whose linear layers take LoRA adapters."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlloop.config import MegatronSettings
from rlloop.errors import TrainerError
from rlloop.trainer.megatron import compat  # noqa: F401  (before anything under megatron)
from rlloop.trainer.megatron.layer import FastLayer, PackedAttention, RMSNorm, rotate_by_token
from rlloop.trainer.megatron.lora import LoraColumnLinear, LoraLinear, LoraRowLinear
from rlloop.trainer.megatron.parallel import Groups
from rlloop.trainer.megatron.slots import AdaptableLayer, Projection
from rlloop.trainer.megatron.stages import share_layers

from megatron.bridge import AutoBridge  # isort: skip
from megatron.bridge.models.conversion.param_mapping import AutoMapping, GatedMLPMapping, QKVMapping  # isort: skip
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add  # isort: skip
from megatron.core.models.backends import LocalSpecProvider  # isort: skip
from megatron.core.models.gpt.gpt_model import GPTModel  # isort: skip
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend  # isort: skip
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear  # isort: skip
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules  # isort: skip
from megatron.core.transformer.enums import AttnBackend, AttnMaskType  # isort: skip
from megatron.core.transformer.identity_op import IdentityOp  # isort: skip
from megatron.core.transformer.spec_utils import ModuleSpec  # isort: skip
from megatron.core.transformer.transformer_block import (  # isort: skip
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import (  # isort: skip
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from megatron.core.utils import get_attr_wrapped_model  # isort: skip

_log = logging.getLogger(__name__)

for _class, _cut in ((LoraColumnLinear, "column"), (LoraRowLinear, "row"), (RMSNorm, "replicated")):
    AutoMapping.register_module_type(_class.__name__, _cut)  # how the bridge cuts a weight that it loads


@dataclass(frozen=True)
class Model:
    """This rank's part of the model: one chunk, or several of an interleaved pipeline."""

    bridge: Any
    chunks: list[Any]
    config: Any
    layers: tuple[AdaptableLayer, ...]
    num_weights: int
    """Of its layers, as many as a token is multiplied with."""
    head: Tensor | None
    """[vocabulary / tensor-parallel ranks, C], on the last stage."""

    @property
    def targets(self) -> set[str]:
        """What an adapter can be put on."""
        return {projection.target for layer in self.layers for projection in layer.projections}

    @property
    def is_fast(self) -> bool:
        """Whether all layers are FastLayer."""
        return all(isinstance(layer, FastLayer) for chunk in self.chunks for layer in inner_model(chunk).decoder.layers)

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """The base weights by Hugging Face names, whole on every rank, one at a time. Every rank must exhaust it."""
        yield from self.bridge.export_hf_weights(self.chunks, show_progress=False)


def build_model(
    source: str, settings: MegatronSettings, groups: Groups, dtype: torch.dtype, *, recompute: bool = False
) -> Model:
    """Load a folder in transformers' format; `recompute`: activations are computed again in the backward pass.

    Raises TrainerError for a model that this trainer would compute wrongly.
    """
    try:
        bridge = AutoBridge.from_hf_pretrained(source)
        provider = bridge.to_megatron_provider(load_weights=True)
        overrides = _overrides(provider, settings, groups, dtype, recompute=recompute)
        provider.apply_overrides_and_finalize(dtype=dtype, overrides=overrides)
        provider.register_pre_wrap_hook(_freeze)
        on_cpu = groups.device.type == "cpu"
        chunks = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=on_cpu)
    except (AttributeError, TypeError, ValueError) as error:  # as it says of a kind of model that it does not know
        raise TrainerError(
            f"Megatron-Bridge could not load the model ({type(error).__name__}: {shorten(str(error), 200)}); where it does "
            "not know its kind, use --trainer.kind peft"
        ) from error
    _check(bridge, chunks, provider, groups)
    window = _sliding_window(bridge.hf_pretrained.config)
    for chunk in chunks:
        rotate_by_token(inner_model(chunk).rotary_pos_emb)
        chunk.train()
        for module in chunk.modules():
            if isinstance(module, PackedAttention):
                module.window = window
    layers = tuple(_adaptable_layers(bridge, chunks, provider))
    last = inner_model(chunks[-1])
    head = None
    if last.post_process:
        tied = last.share_embeddings_and_output_weights
        head = (last.shared_embedding_or_output_weight() if tied else last.output_layer.weight).detach()
    return Model(
        bridge=bridge,
        chunks=chunks,
        config=provider,
        layers=layers,
        num_weights=sum(_num_weights(chunk, provider) for chunk in chunks),
        head=head,
    )


def _overrides(
    provider: Any, settings: MegatronSettings, groups: Groups, dtype: torch.dtype, *, recompute: bool
) -> dict[str, Any]:
    """Of what the bridge read from the model's config."""
    overrides: dict[str, Any] = {
        "tensor_model_parallel_size": groups.tp_size,
        "pipeline_model_parallel_size": groups.pp_size,
        "virtual_pipeline_model_parallel_size": settings.virtual_stages if settings.virtual_stages > 1 else None,
        # Interleaved stages of varying lengths: otherwise shapes of different microbatches meet.
        "overlap_p2p_comm": settings.virtual_stages > 1,
        "batch_p2p_comm": settings.virtual_stages == 1,
        "pipeline_model_parallel_layout": _pipeline_layout(provider, groups.pp_size, settings.virtual_stages),
        "sequence_parallel": settings.sequence_parallel,
        "transformer_layer_spec": _block_spec,
        "attention_backend": AttnBackend.auto,  # any other puts a core attention of Megatron's in place of ours
        "pipeline_dtype": dtype,
        "variable_seq_lengths": True,  # microbatches have lengths of their own: stages tell each other the shapes
        "moe_token_dispatcher_type": "alltoall",  # the default refuses variable_seq_lengths, even of dense models
        "calculate_per_token_loss": True,  # leaves the caller's loss as it is: no division by microbatches
        "hidden_dropout": 0.0,  # the policy that learns is the one that sampled
        "attention_dropout": 0.0,
        # Kernels of Apex or Transformer Engine, or what FastLayer compiles itself:
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
        "moe_permute_fusion": False,
        "moe_grouped_gemm": False,
        # The router is frozen: a loss that balances experts would only pull at the hidden states.
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_z_loss_coeff": None,
    }
    if recompute:
        overrides |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return overrides


def _pipeline_layout(config: Any, num_stages: int, virtual_stages: int) -> list[list[str]] | None:
    """Which layers each chunk has, in the order of the model; None: all in one."""
    num_chunks = num_stages * virtual_stages
    if num_chunks == 1:
        return None
    size, heads = config.hidden_size, config.num_attention_heads
    head_size, num_groups = config.kv_channels or size // heads, config.num_query_groups or heads
    layer = 2 * size * head_size * (heads + num_groups) + 3 * size * config.ffn_hidden_size
    # Two thirds: prompts do not go through the head.
    counts = share_layers(config.num_layers, num_chunks, head_cost=size * config.vocab_size / layer * 2 / 3)
    chunks = [["decoder"] * count for count in counts]
    return [["embedding", *chunks[0]], *chunks[1:-1], [*chunks[-1], "loss"]]


def _check(bridge: Any, chunks: list[Any], config: Any, groups: Groups) -> None:
    """Refuse what the model has and the layers here would pass over."""
    inner = [inner_model(chunk) for chunk in chunks]
    head = getattr(inner[-1], "output_layer", None)
    unsupported = {
        f"a model class of its own ({type(inner[0]).__name__})": type(inner[0]) is not GPTModel,
        f"a head of its own ({type(head).__name__})": head is not None and type(head) is not ColumnParallelLinear,
        "experts on several tensor-parallel ranks": bool(config.num_moe_experts) and groups.tp_size > 1,
        "norms whose weights count from zero": config.layernorm_zero_centered_gamma,
        "softcapped attention": bool(getattr(config, "attn_logit_softcapping", None)),
        "attention sinks": config.softmax_type != "vanilla",
        "scaled logits": config.use_mup,
        "clipped queries and keys": config.qk_clip,
        "rotary embeddings that Megatron computes otherwise": not _same_rotation(bridge.hf_pretrained.config, inner[0]),
    }
    found = [feature for feature, applies in unsupported.items() if applies]
    tasks = [
        task for task in bridge._model_bridge.build_conversion_tasks(bridge.hf_pretrained, chunks) if task is not None
    ]
    saved = {name for name in bridge.hf_pretrained.state.source.get_all_keys() if not name.endswith(".inv_freq")}
    own = {name: parameter for chunk in inner for name, parameter in chunk.named_parameters()}
    if config.share_embeddings_and_output_weights:
        saved.discard("lm_head.weight")
        own.pop("output_layer.weight", None)
    loaded = {task.param_weight.data_ptr() for task in tasks if task.param_weight is not None}
    if empty := sorted(name for name, parameter in own.items() if parameter.data_ptr() not in loaded):
        found.append(f"no weights for {empty[0]}")
    names = set().union(*groups.gather({name for task in tasks for name in _hf_names(task.mapping)}))
    if left_over := sorted(saved - names):
        found.append(f"weights that Megatron's layers have no place for ({len(left_over)}, such as {left_over[0]})")
    reasons = [reason for reasons in groups.gather(found) for reason in reasons]  # all of them end, or none
    if reasons:
        raise TrainerError(f"the megatron trainer does not support {reasons[0]}; use --trainer.kind peft")


def inner_model(chunk: Any) -> Any:
    """Megatron's model without its wrappers, one of which would turn its output into fp32."""
    return get_attr_wrapped_model(chunk, "decoder", return_model_obj=True)


def _same_rotation(hf_config: Any, model: Any) -> bool:
    """Whether Megatron's rotary embedding has transformers' frequencies: it knows few of the ways to stretch them."""
    with torch.device("meta"):
        decoder = AutoModelForCausalLM.from_config(hf_config).get_decoder()
    if not hasattr(decoder, "rotary_emb") or not hasattr(getattr(model, "rotary_pos_emb", None), "inv_freq"):
        return False
    expected = type(decoder.rotary_emb)(hf_config)
    if not hasattr(expected, "inv_freq"):  # of several kinds of layers
        return False
    frequencies = model.rotary_pos_emb.inv_freq.cpu() / (model.rotary_pos_emb.seq_len_interpolation_factor or 1)
    return bool(
        frequencies.shape == expected.inv_freq.shape
        and torch.allclose(frequencies, expected.inv_freq.float(), rtol=1e-4)
        and expected.attention_scaling == 1
    )


def _sliding_window(hf_config: Any) -> int | None:
    """Tokens of the window, if any layer has one."""
    if not getattr(hf_config, "use_sliding_window", True):
        return None
    return getattr(hf_config, "sliding_window", None)


def _hf_names(mapping: Any) -> Iterable[str]:
    return (mapping.hf_param,) if isinstance(mapping.hf_param, str) else mapping.hf_param.values()


def _freeze(chunks: list[Any]) -> list[Any]:
    """The base is frozen. The gradient reaches the first layer's adapter through the embedding's output."""
    for chunk in chunks:
        chunk.requires_grad_(False)
        embedding = getattr(chunk, "embedding", None)
        if embedding is not None:
            embedding.register_forward_hook(
                lambda module, arguments, output: output.requires_grad_(torch.is_grad_enabled())
            )
    return chunks


class _Spec(LocalSpecProvider):
    """Which module stands for what."""

    def column_parallel_linear(self) -> type:
        return LoraColumnLinear

    def row_parallel_linear(self) -> type:
        return LoraRowLinear

    def core_attention(self) -> type:
        return PackedAttention

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> Any:
        return RMSNorm if rms_norm else super().layer_norm(rms_norm, for_qk, has_residual)


def _num_weights(chunk: Any, config: Any) -> int:
    """What a token is multiplied with in a chunk's layers."""
    total = 0.0
    for name, module in inner_model(chunk).decoder.named_modules():
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
            is_expert = ".experts." in name
            total += module.weight.numel() * (config.moe_router_topk / config.num_moe_experts if is_expert else 1)
    return int(total)


def _block_spec(config: Any, vp_stage: int | None = None) -> ModuleSpec:
    """The layers of one chunk."""
    first = get_transformer_layer_offset(config, vp_stage)
    sparse = [_is_sparse(config, first + index) for index in range(get_num_layers_to_build(config, vp_stage))]
    specs = {is_sparse: _layer_spec(config, is_sparse) for is_sparse in sorted(set(sparse))}
    layers = [specs[is_sparse] for is_sparse in sparse]
    norm = _Spec().layer_norm(rms_norm=config.normalization == "RMSNorm")
    return ModuleSpec(TransformerBlock, submodules=TransformerBlockSubmodules(layers, norm))


def _is_sparse(config: Any, index: int) -> bool:
    """Whether a layer has experts."""
    every = config.moe_layer_freq
    return bool(config.num_moe_experts) and bool(every[index] if isinstance(every, list) else index % every == 0)


def _layer_spec(config: Any, is_sparse: bool) -> ModuleSpec:
    if config.multi_latent_attention:
        raise TrainerError("the megatron trainer does not support multi-latent attention; use --trainer.kind peft")
    spec = _Spec()
    norm = spec.layer_norm(rms_norm=config.normalization == "RMSNorm")
    head_norm = norm if config.qk_layernorm else IdentityOp
    reason = "experts" if is_sparse else _not_fast(config)
    if reason:
        _log.warning(
            "training with Megatron's own transformer layer, which is slower, because the model has %s", reason
        )
    return ModuleSpec(
        module=TransformerLayer if reason else FastLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=spec.column_parallel_linear(),
                    core_attention=spec.core_attention(),
                    linear_proj=spec.row_parallel_linear(),
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=get_mlp_module_spec_for_backend(spec, config.num_moe_experts if is_sparse else None),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _not_fast(config: Any) -> str | None:
    """Why FastLayer does not compute what this model does; None when it does."""
    reasons = {
        f"{config.normalization} in place of RMSNorm": config.normalization != "RMSNorm",
        "no gated linear unit": not config.gated_linear_unit,
        "an activation other than SiLU": config.activation_func is not torch.nn.functional.silu,
        "interleaved rotary embeddings": config.rotary_interleaved,
        "no rotary embeddings": getattr(config, "position_embedding_type", "rope") != "rope",
        "layers without rotary embeddings": bool(getattr(config, "no_rope_freq", None)),
        "an output gate in attention": getattr(config, "attention_output_gate", False),
        "a clamped activation": getattr(config, "activation_func_clamp_value", None) is not None,
        "residuals in fp32": config.fp32_residual_connection,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def _adaptable_layers(bridge: Any, chunks: list[Any], config: Any) -> Iterator[AdaptableLayer]:
    """This rank's linear layers in the model's order, with the Hugging Face layers that each one holds."""
    registry = bridge._model_bridge.mapping_registry()
    for chunk in chunks:
        for layer in inner_model(chunk).decoder.layers:
            for name, module in layer.named_modules():
                if isinstance(module, LoraLinear):  # experts are not, for transformers' have no linear layers
                    mapping = registry.megatron_to_hf_lookup(f"decoder.layers.{layer.layer_number - 1}.{name}.weight")
                    yield AdaptableLayer(module, _projections(mapping, module, config))


def _projections(mapping: Any, module: LoraLinear, config: Any) -> tuple[Projection, ...]:
    device, num_rows = module.weight.device, len(module.weight)
    make = partial(_projection, device=device)
    if isinstance(mapping, QKVMapping) and not config.attention_output_gate:
        rows = torch.arange(num_rows).view(
            -1, config.num_attention_heads // config.num_query_groups + 2, config.kv_channels
        )
        parts = {"q": rows[:, :-2], "k": rows[:, -2], "v": rows[:, -1]}
        return tuple(make(mapping.hf_param[key], part) for key, part in parts.items())
    if isinstance(mapping, GatedMLPMapping):
        gate, up = torch.arange(num_rows).chunk(2)
        return make(mapping.hf_param["gate"], gate), make(mapping.hf_param["up"], up)
    if isinstance(mapping, AutoMapping) and isinstance(mapping.hf_param, str):
        return (make(mapping.hf_param, None),)
    return ()


def _projection(hf_name: str, rows: Tensor | None, device: torch.device) -> Projection:
    name = f"base_model.model.{hf_name.removesuffix('.weight')}"
    return Projection(name, None if rows is None else rows.flatten().to(device))
