"""The `peft` trainer's rank: the model, its adapters and their optimizers. Everything here runs in the rank's process."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import peft
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from rlloop.batching import Microbatch, pack
from rlloop.errors import TrainerError
from rlloop.trainer import Head, Loss, TokenBatch
from rlloop.trainer.adapter_files import (
    MOMENTS,
    VALUE_HEAD,
    check_lora,
    initial_a,
    merged,
    peft_config,
    read_adapter,
    write_adapter,
)
from rlloop.trainer.attention import IMPLEMENTATION, PackedLayout
from rlloop.trainer.head import head_weight, token_logprobs, token_values
from rlloop.trainer.lora import FusedLinear
from rlloop.trainer.rank_trainer import RankArguments
from rlloop.trainer.ranks import RankContext
from rlloop.trainer.steps import SkippedSteps, get_adapter, gradient_discarded_on_error, measure_peak, throughput
from rlloop.trainer.tokens import Columns, Totals, to_device
from rlloop.types import AdamConfig, AdapterTicket, FloatArray, LoraConfig, Metrics, OptimResult, Sample

_ROWS_DIFFER = {torch.float32: 1e-3, torch.bfloat16: 0.02}
"""Nats a token, at most. Most models do not differ at all, but how many tokens an expert has may choose its kernel."""
_MODEL_INPUTS = ("tokens", "positions", "hidden_index", "targets")


@dataclass
class _Adapter:
    lora: LoraConfig
    parameters: dict[str, nn.Parameter]
    """By PEFT's names, those of adapter_model.safetensors, and those of `VALUE_HEAD`."""
    optimizer: torch.optim.AdamW
    loss_was_finite: bool = True
    """Of all that is in the gradient."""

    @property
    def head(self) -> Head:
        return "value" if VALUE_HEAD[0] in self.parameters else "policy"

    def discard_gradient(self) -> None:
        self.optimizer.zero_grad()
        self.loss_was_finite = True


class PeftRank:
    """See `PeftTrainer`, whose methods these are."""

    def __init__(self, context: RankContext, arguments: RankArguments) -> None:
        self._context = context
        self._settings = settings = arguments.settings
        self._temperature = arguments.temperature
        self._writer = arguments.writer
        self._sender = arguments.sender
        if self._sender is not None:
            self._sender.listen()
        self._folder = arguments.model
        self._skipped = SkippedSteps(settings.max_nonfinite_steps)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._dtype: torch.dtype = getattr(torch, arguments.dtype)
        torch.manual_seed(arguments.seed)
        base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=self._dtype).to(self._device)
        base.requires_grad_(requires_grad=False)
        self._head = head_weight(base)
        if not base._supports_attention_backend:
            raise TrainerError(
                f"{type(base).__name__} does not let the trainer replace its attention (for packed rows)"
            )
        base.set_attn_implementation(IMPLEMENTATION)
        base.eval()  # the policy that learns is the one that sampled
        if settings.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
            for module in base.modules():
                if isinstance(module, GradientCheckpointingLayer):
                    module.training = True  # without which it computes nothing anew; what is in it stays as it is
        self._base = base
        self._decoder = base.get_decoder()
        self._peft: peft.PeftModel | None = None
        self._adapters: dict[str, _Adapter] = {}
        self._active: str | None = None
        linear = {path: module for path, module in self._decoder.named_modules() if isinstance(module, nn.Linear)}
        self._linear_names = {path.rpartition(".")[2] for path in linear}
        # Experts are stacked, [number, out, in]; a token goes through some of them.
        stacked = [each for each in self._decoder.parameters() if each.ndim == 3]
        of_token = getattr(base.config, "num_experts_per_tok", 1)
        self._num_body = sum(module.weight.numel() for module in linear.values())
        self._num_body += sum(of_token * each[0].numel() for each in stacked)
        self._peak_flops = measure_peak(self._device, self._dtype)
        self._check_rows()

    @torch.no_grad()
    def _check_rows(self) -> None:
        """Raise TrainerError for a model in which one answer changes the logprobs of those beside it in the row, as with
        convolutions or states, or whose logprobs are no two times the same."""
        first = np.random.default_rng(0).integers(0, self._head.shape[0], (3, 12), dtype=np.int32)
        first[:, :6] = first[0, :6]  # the prompt
        second = first.copy()
        second[0, 6:] = first[0, :5:-1]
        mask, zeros = np.arange(12) >= 6, np.zeros(12, np.float32)
        found = []
        for tokens in (first, second):
            [row] = pack([Sample(each, mask, zeros, zeros, zeros, prompt_id=0) for each in tokens], 1000)
            found.append(self._forward(row, None)[0][6:])  # without the first answer's
        difference = float((found[0] - found[1]).abs().mean())
        if not difference <= _ROWS_DIFFER[self._dtype] / min(1.0, self._temperature):
            raise TrainerError(
                f"{type(self._base).__name__}: expected logprobs that do not depend on other answers in the row, but they differ "
                f"by {difference:.2g} nats a token. It has layers beside attention that mix tokens, or dropout; the trainer "
                "packs answers into rows, and cannot train it"
            )

    def close(self) -> None:
        """Free what the transport holds."""
        self._writer.close()
        if self._sender is not None:
            self._sender.close()

    def create_adapter(self, name: str, lora: LoraConfig, head: Head = "policy") -> None:
        """A is drawn by parameter name, so it depends on neither layout nor other adapters."""
        if name in self._adapters:
            raise TrainerError(f"adapter {name!r} exists already")
        check_lora(name, lora, self._linear_names)
        config = peft_config(lora, self._folder)
        config._register_custom_module({nn.Linear: FusedLinear})  # PEFT's documented way to bring an own layer
        if self._peft is None:
            self._peft = peft.get_peft_model(self._base, config, adapter_name=name)
        else:
            self._peft.add_adapter(name, config)
        kinds = {"lora_A": ".weight", "lora_B": ".weight", "lora_magnitude_vector": ""}
        parameters = {
            parameter_name.removesuffix(f".{name}.weight") + saved_ending: parameter
            for parameter_name, parameter in self._peft.named_parameters()
            for kind, saved_ending in kinds.items()
            if parameter_name.endswith(f".{kind}.{name}.weight")
        }
        with torch.no_grad():
            for parameter_name, parameter in parameters.items():
                if ".lora_A." in parameter_name:
                    parameter.copy_(initial_a(parameter_name, lora.seed, parameter.shape))
        if head == "value":
            for parameter_name, shape in zip(VALUE_HEAD, ((1, self._head.shape[1]), (1,)), strict=True):
                parameters[parameter_name] = nn.Parameter(torch.zeros(shape, device=self._device))
        optimizer = torch.optim.AdamW(list(parameters.values()), fused=True)
        self._adapters[name] = _Adapter(lora, parameters, optimizer)
        self._active = None

    def remove_adapter(self, name: str) -> None:
        """PEFT keeps its layers, without this adapter."""
        if name not in self._adapters:
            return
        assert self._peft is not None
        others = [other for other in self._adapters if other != name]
        if others:
            self._activate(others[0])  # PEFT warns when it has to choose
        self._peft.delete_adapter(name)
        del self._adapters[name]
        self._skipped.forget(name)
        if not others:
            self._active = None

    def forward_backward(self, name: str, samples: Sequence[Sample], loss: Loss) -> Metrics:
        """Gradients add up until `optim_step`; an interrupted call discards them."""
        started = time.perf_counter()
        adapter = self._activate(name)
        columns, totals = Columns(samples), Totals()
        with gradient_discarded_on_error(adapter.discard_gradient):
            for microbatch in pack(samples, self._settings.max_tokens_per_microbatch):
                self._context.check_interrupt()
                outputs, entropy = self._forward(microbatch, adapter)
                tokens = TokenBatch(**columns.of(microbatch, self._device), entropy=entropy)
                value, metrics = loss(outputs, tokens)
                value.backward()
                totals.add(value, tokens, microbatch, metrics)
        summary = totals.summary()
        adapter.loss_was_finite &= summary.is_finite
        seconds = time.perf_counter() - started
        return summary.metrics() | throughput(
            summary,
            seconds,
            num_body=self._num_body,
            num_head=self._head.numel() if adapter.head == "policy" else 0,
            peak_flops=self._peak_flops,
        )

    def optim_step(self, name: str, adam: AdamConfig) -> OptimResult:
        """AdamW in fp32. A skipped step leaves weights and moments bit for bit as they were."""
        adapter = self._get(name)
        gradients = [p.grad for p in adapter.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        grad_norm = float(norm) if adapter.loss_was_finite else math.nan
        skipped = not math.isfinite(grad_norm)
        if not skipped:
            torch.nn.utils.clip_grads_with_norm_(adapter.parameters.values(), adam.max_grad_norm, norm)
            for group in adapter.optimizer.param_groups:
                group.update(lr=adam.lr, betas=adam.betas, eps=adam.eps, weight_decay=adam.weight_decay)
            adapter.optimizer.step()
        adapter.discard_gradient()
        self._skipped.count(name, skipped)
        return OptimResult(grad_norm=grad_norm, skipped=skipped)

    def logprobs(self, name: str | None, samples: Sequence[Sample]) -> list[FloatArray]:
        """Of an adapter with a policy head, or of the base."""
        if name is not None:
            return self._evaluate(self._activate(name, "policy"), samples)
        with self._without_adapter():
            return self._evaluate(None, samples)

    def values(self, name: str, samples: Sequence[Sample]) -> list[FloatArray]:
        """Of an adapter with a value head."""
        return self._evaluate(self._activate(name, "value"), samples)

    def export_adapter(self, name: str) -> AdapterTicket:
        """The transport scales B and casts."""
        adapter = self._get(name, "policy")
        tensors = {key: parameter.detach() for key, parameter in adapter.parameters.items()}
        return self._writer.write(tensors, adapter.lora.alpha / adapter.lora.rank)

    def send_weights(self, name: str) -> None:
        """To all who ask."""
        assert self._sender is not None
        self._sender.send(self._weights(name), self._context.check_interrupt)

    @torch.no_grad()
    def _weights(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """The model's, the adapter merged into them, W + s B A, by Hugging Face names."""
        adapter = self._get(name, "policy")
        for key, weight in self._base.named_parameters():
            if ".lora_" not in key:
                hf_name = key.replace(".base_layer.", ".")
                yield hf_name, merged(hf_name, weight, adapter.parameters, adapter.lora)

    def save(self, name: str, folder: Path) -> None:
        """What `peft.PeftModel.from_pretrained` reads, and the optimizer's and torch's state, as safetensors."""
        adapter = self._get(name)
        moments = {
            f"{key}.{moment}": tensor
            for key, parameter in adapter.parameters.items()
            for moment, tensor in adapter.optimizer.state.get(parameter, {}).items()
        }
        write_adapter(folder, peft_config(adapter.lora, self._folder), adapter.parameters, moments)

    def load(self, name: str, folder: Path) -> None:
        """Bit for bit. The adapter must have the shapes that were saved."""
        adapter = self._get(name)
        shapes = {key: tuple(parameter.shape) for key, parameter in adapter.parameters.items()}
        weights, moments = read_adapter(folder, name, shapes)
        adapter.discard_gradient()
        adapter.optimizer.state.clear()
        for key, parameter in adapter.parameters.items():
            parameter.data.copy_(weights[key])
            if f"{key}.step" in moments:
                adapter.optimizer.state[parameter] = {
                    moment: moments[f"{key}.{moment}"].to(self._device) for moment in MOMENTS
                }

    def _get(self, name: str, head: Head | None = None) -> _Adapter:
        return get_adapter(self._adapters, name, head)

    @torch.no_grad()
    def _evaluate(self, adapter: _Adapter | None, samples: Sequence[Sample]) -> list[FloatArray]:
        """Its outputs, in microbatches, like training."""
        flat = np.zeros(sum(len(sample.tokens) for sample in samples), dtype=np.float32)
        for microbatch in pack(samples, self._settings.max_tokens_per_microbatch):
            self._context.check_interrupt()
            flat[microbatch.loss_index] = self._forward(microbatch, adapter)[0].cpu().numpy()
        return np.split(flat, np.cumsum([len(sample.tokens) for sample in samples]))[:-1]

    def _activate(self, name: str, head: Head | None = None) -> _Adapter:
        adapter = self._get(name, head)
        if self._active != name:
            assert self._peft is not None
            self._peft.set_adapter(name)
            self._active = name
        return adapter

    def _without_adapter(self) -> AbstractContextManager[None]:
        if self._peft is None or not self._adapters:  # PEFT cannot leave out what is not there
            return nullcontext()
        return self._peft.disable_adapter()

    def _forward(self, microbatch: Microbatch, adapter: _Adapter | None) -> tuple[Tensor, Tensor | None]:
        """-> logprobs and entropy of its loss tokens, both [N]; or values, of a value adapter. It is the active one."""
        on_device = {key: to_device(getattr(microbatch, key), self._device) for key in _MODEL_INPUTS}
        hidden = self._decoder(
            input_ids=on_device["tokens"][None],
            position_ids=on_device["positions"][None],
            use_cache=False,
            packed_layout=PackedLayout(microbatch, device=self._device, dtype=self._dtype),
        ).last_hidden_state[0]
        predicting = hidden.index_select(0, on_device["hidden_index"])
        if adapter is not None and adapter.head == "value":
            return token_values(predicting, *[adapter.parameters[name] for name in VALUE_HEAD]), None
        return token_logprobs(predicting, self._head, on_device["targets"], temperature=self._temperature)
