"""The `peft` trainer's rank: the model, its adapters and their optimizers. Everything here runs in the rank's process."""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rlloop.batching import Microbatch, pack
from rlloop.config import TrainerSettings
from rlloop.errors import NonFiniteError, TrainerError
from rlloop.trainer import AdapterWriter, Loss, TokenBatch
from rlloop.trainer.attention import IMPLEMENTATION, PackedLayout
from rlloop.trainer.head import head_weight, token_logprobs
from rlloop.trainer.lora import FusedLinear
from rlloop.trainer.ranks import RankContext
from rlloop.types import AdamConfig, AdapterTicket, FloatArray, LoraConfig, Metrics, OptimResult, Sample

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
_MODEL_INPUTS = ("tokens", "positions", "hidden_index", "targets")


@dataclass
class _Adapter:
    lora: LoraConfig
    parameters: dict[str, nn.Parameter]
    """By PEFT's names, those of adapter_model.safetensors."""
    optimizer: torch.optim.AdamW
    loss_was_finite: bool = True
    """Of all that is in the gradient."""
    num_skipped_in_a_row: int = 0

    def discard_gradient(self) -> None:
        self.optimizer.zero_grad()
        self.loss_was_finite = True


@dataclass
class _Totals:
    """Metrics over the loss tokens of all microbatches of one call."""

    num_tokens: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Each [N], the same N."""
        self.num_tokens += len(next(iter(metrics.values())))
        for name, values in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(values.sum())
            self.maxima[name] = max(self.maxima.get(name, -np.inf), float(values.max()))

    def result(self) -> Metrics:
        means = {f"{name}/mean": total / self.num_tokens for name, total in self.sums.items()}
        return means | {f"{name}/max": value for name, value in self.maxima.items()}


class PeftRank:
    """See `PeftTrainer`, whose methods these are."""

    def __init__(
        self,
        context: RankContext,
        model: str,
        dtype: str,
        settings: TrainerSettings,
        temperature: float,
        writer: AdapterWriter,
        seed: int,
    ) -> None:
        self._context = context
        self._settings = settings
        self._temperature = temperature
        self._writer = writer
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._dtype: torch.dtype = getattr(torch, dtype)
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(model, dtype=self._dtype).to(self._device)
        base.requires_grad_(requires_grad=False)
        self._head = head_weight(base)
        if not base._supports_attention_backend:
            raise TrainerError(
                f"{type(base).__name__} does not let the trainer replace its attention (for packed rows)"
            )
        base.set_attn_implementation(IMPLEMENTATION)
        base.train(settings.gradient_checkpointing)  # transformers checkpoints in training mode only
        for module in base.modules():
            if isinstance(module, nn.Dropout):
                module.eval()  # the policy that learns is the one that sampled
        if settings.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        self._base = base
        self._decoder = base.get_decoder()
        self._peft: peft.PeftModel | None = None
        self._adapters: dict[str, _Adapter] = {}
        self._active: str | None = None
        linear = {path: module for path, module in self._decoder.named_modules() if isinstance(module, nn.Linear)}
        self._linear_names = {path.rpartition(".")[2] for path in linear}
        self._num_body = sum(module.weight.numel() for module in linear.values())
        self._peak_flops = _measure_peak(self._device, self._dtype)

    def close(self) -> None:
        """Free what the transport holds."""
        self._writer.close()

    def create_adapter(self, name: str, lora: LoraConfig) -> None:
        """A is drawn by parameter name, so it depends on neither layout nor other adapters."""
        if name in self._adapters:
            raise TrainerError(f"adapter {name!r} exists already")
        if unknown := sorted(set(lora.targets) - self._linear_names):  # PEFT ignores them while any other fits
            raise TrainerError(
                f"lora.targets: expected names among {', '.join(sorted(self._linear_names))}, got {', '.join(unknown)}"
            )
        config = peft.LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets), task_type="CAUSAL_LM"
        )
        config._register_custom_module({nn.Linear: FusedLinear})  # PEFT's documented way to bring an own layer
        if self._peft is None:
            self._peft = peft.get_peft_model(self._base, config, adapter_name=name)
        else:
            self._peft.add_adapter(name, config)
        endings = (f".lora_A.{name}.weight", f".lora_B.{name}.weight")
        parameters = {
            parameter_name.removesuffix(f".{name}.weight") + ".weight": parameter
            for parameter_name, parameter in self._peft.named_parameters()
            if parameter_name.endswith(endings)
        }
        with torch.no_grad():
            for parameter_name, parameter in parameters.items():
                if ".lora_A." in parameter_name:
                    parameter.copy_(_draw(parameter_name, lora.seed, parameter.shape))
        optimizer = torch.optim.AdamW(list(parameters.values()), fused=True)
        self._adapters[name] = _Adapter(lora, parameters, optimizer)
        self._active = None

    def remove_adapter(self, name: str) -> None:
        """PEFT keeps its layers, without this adapter."""
        self._get(name)
        assert self._peft is not None
        others = [other for other in self._adapters if other != name]
        if others:
            self._activate(others[0])  # PEFT warns when it has to choose
        self._peft.delete_adapter(name)
        del self._adapters[name]
        if not others:
            self._active = None

    def forward_backward(self, name: str, samples: Sequence[Sample], loss: Loss) -> Metrics:
        """Gradients add up until `optim_step`; an interrupted call discards them."""
        started = time.perf_counter()
        adapter = self._activate(name)
        columns = _columns(samples)
        totals, loss_sum, num_computed, flops = _Totals(), 0.0, 0, 0
        try:
            for microbatch in pack(samples, self._settings.max_tokens_per_microbatch):
                self._context.check_interrupt()
                logprobs, entropy = self._forward(microbatch)
                tokens = self._token_batch(columns, microbatch, entropy)
                value, metrics = loss(logprobs, tokens)
                value.backward()
                adapter.loss_was_finite &= bool(value.isfinite())
                difference = (logprobs.detach() - tokens.rollout_logprobs).abs()
                always = {"entropy": entropy, "sampler_logprob_diff": difference}
                totals.add(always | {key: values.detach() for key, values in metrics.items()})
                loss_sum += float(value.detach())
                num_computed += len(microbatch.tokens)
                # Forward, and backward to the activations only: 2 x 2 operations for each weight and token.
                flops += 4 * (self._num_body * len(microbatch.tokens) + self._head.numel() * len(microbatch.targets))
        except torch.OutOfMemoryError as error:
            adapter.discard_gradient()
            raise TrainerError(
                f"lower trainer.max_tokens_per_microbatch: the trainer ran out of memory ({error})"
            ) from error
        except Exception:
            adapter.discard_gradient()
            raise
        seconds = time.perf_counter() - started
        return totals.result() | {
            "loss": loss_sum,
            "num_tokens": totals.num_tokens,
            "num_computed_tokens": num_computed,
            "forward_backward_seconds": seconds,
            "mfu": flops / seconds / self._peak_flops,
        }

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
        adapter.num_skipped_in_a_row = adapter.num_skipped_in_a_row + 1 if skipped else 0
        if adapter.num_skipped_in_a_row >= self._settings.max_nonfinite_steps:
            raise NonFiniteError(
                f"{adapter.num_skipped_in_a_row} steps in a row had a non-finite loss or gradient (adapter {name!r}); "
                "lower optim.lr, or look for a reward or advantage that is not finite"
            )
        return OptimResult(grad_norm=grad_norm, skipped=skipped)

    @torch.no_grad()
    def logprobs(self, name: str | None, samples: Sequence[Sample]) -> list[FloatArray]:
        """In microbatches, like training."""
        flat = np.zeros(sum(len(sample.tokens) for sample in samples), dtype=np.float32)
        with self._without_adapter() if name is None else nullcontext():
            if name is not None:
                self._activate(name)
            for microbatch in pack(samples, self._settings.max_tokens_per_microbatch):
                self._context.check_interrupt()
                flat[microbatch.loss_index] = self._forward(microbatch)[0].cpu().numpy()
        return np.split(flat, np.cumsum([len(sample.tokens) for sample in samples]))[:-1]

    def export_adapter(self, name: str) -> AdapterTicket:
        """The transport scales B and casts."""
        adapter = self._get(name)
        tensors = {key: parameter.detach() for key, parameter in adapter.parameters.items()}
        return self._writer.write(tensors, adapter.lora.alpha / adapter.lora.rank)

    def save(self, name: str, folder: Path) -> None:
        """What `peft.PeftModel.from_pretrained` reads, and the optimizer's and torch's state, as safetensors."""
        adapter = self._get(name)
        (folder / "adapter").mkdir(parents=True, exist_ok=True)
        (folder / "state").mkdir(exist_ok=True)
        weights = {key: parameter.detach().cpu().contiguous() for key, parameter in adapter.parameters.items()}
        save_file(weights, folder / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
        assert self._peft is not None
        config = copy.copy(self._peft.peft_config[name])
        config.inference_mode = True
        config.save_pretrained(folder / "adapter")
        moments = {
            f"{key}.{moment}": tensor
            for key, parameter in adapter.parameters.items()
            for moment, tensor in adapter.optimizer.state.get(parameter, {}).items()
        }
        save_file(moments, folder / "state" / "optimizer.safetensors")
        save_file({"torch": torch.get_rng_state()}, folder / "state" / "rng.safetensors")

    def load(self, name: str, folder: Path) -> None:
        """Bit for bit. The adapter must have the shapes that were saved."""
        adapter = self._get(name)
        weights = load_file(folder / "adapter" / "adapter_model.safetensors")
        wanted = {key: tuple(parameter.shape) for key, parameter in adapter.parameters.items()}
        found = {key: tuple(tensor.shape) for key, tensor in weights.items()}
        if wanted != found:
            key = min(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
            raise TrainerError(
                f"{folder}: the adapter saved there does not fit adapter {name!r}; at {key}: expected "
                f"{wanted.get(key)}, got {found.get(key)}. Keep lora.rank, lora.targets and model of the saved run"
            )
        moments = load_file(folder / "state" / "optimizer.safetensors", device=str(self._device))
        adapter.discard_gradient()
        adapter.optimizer.state.clear()
        for key, parameter in adapter.parameters.items():
            parameter.data.copy_(weights[key])
            if f"{key}.step" in moments:
                adapter.optimizer.state[parameter] = {moment: moments[f"{key}.{moment}"] for moment in _MOMENTS}
        torch.set_rng_state(load_file(folder / "state" / "rng.safetensors")["torch"])

    def _get(self, name: str) -> _Adapter:
        if name not in self._adapters:
            raise TrainerError(f"no adapter is named {name!r}; there are: {', '.join(self._adapters) or 'none'}")
        return self._adapters[name]

    def _activate(self, name: str) -> _Adapter:
        adapter = self._get(name)
        if self._active != name:
            assert self._peft is not None
            self._peft.set_adapter(name)
            self._active = name
        return adapter

    def _without_adapter(self) -> AbstractContextManager[None]:
        return nullcontext() if self._peft is None else self._peft.disable_adapter()

    def _forward(self, microbatch: Microbatch) -> tuple[Tensor, Tensor]:
        """-> logprobs and entropy of its loss tokens, both [N]."""
        on_device = {key: torch.from_numpy(getattr(microbatch, key)).to(self._device) for key in _MODEL_INPUTS}
        hidden = self._decoder(
            input_ids=on_device["tokens"][None],
            position_ids=on_device["positions"][None],
            use_cache=False,
            packed_layout=PackedLayout(microbatch, device=self._device, dtype=self._dtype),
        ).last_hidden_state[0]
        predicting = hidden.index_select(0, on_device["hidden_index"])
        return token_logprobs(predicting, self._head, on_device["targets"], temperature=self._temperature)

    def _token_batch(
        self, columns: dict[str, FloatArray | None], microbatch: Microbatch, entropy: Tensor
    ) -> TokenBatch:
        tensors = {
            key: None if column is None else torch.from_numpy(column[microbatch.loss_index]).to(self._device)
            for key, column in columns.items()
        }
        return TokenBatch(**tensors, entropy=entropy)


def _columns(samples: Sequence[Sample]) -> dict[str, FloatArray | None]:
    """Each of the samples' arrays as one, as `Microbatch.loss_index` counts."""
    columns: dict[str, FloatArray | None] = {}
    for key in ("advantages", "loss_weights", "rollout_logprobs", "old_logprobs", "ref_logprobs"):
        arrays = [getattr(sample, key) for sample in samples]
        missing = [array is None for array in arrays]
        if any(missing) and not all(missing):
            raise TrainerError(f"{key}: give it for every sample of a batch or for none")
        columns[key] = None if not arrays or missing[0] else np.concatenate(arrays, dtype=np.float32)
    return columns


def _draw(parameter_name: str, seed: int, shape: torch.Size) -> Tensor:
    """PEFT's initial A (kaiming uniform with a = sqrt(5): within 1 / sqrt(fan in)), from the seed and the name alone."""
    digest = hashlib.sha256(f"{seed}/{parameter_name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    bound = shape[1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of one large matrix product: what `mfu` is a fraction of."""
    size = 1024 if device.type == "cpu" else 8192
    matrix = torch.randn(size, size, device=device).to(dtype)
    best = math.inf
    for _ in range(4):
        started = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
