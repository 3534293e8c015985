"""What a checkpoint holds of an adapter, the same for every trainer, so that either can go on from the other's:

    adapter/   what `peft.PeftModel.from_pretrained` reads; a value adapter's head is in value_head.safetensors
    state/     optimizer.safetensors: `<PEFT's name>.<moment>` in fp32, and rng.safetensors

Full tensors, never a rank's share: any number of ranks can load them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlloop.errors import TrainerError
from rlloop.models import hub_name
from rlloop.types import LoraConfig

VALUE_HEAD = ("value_head.weight", "value_head.bias")
"""[1, H] and [1] of a value adapter, in fp32."""
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""AdamW's state of a parameter: two tensors like it, and the number of its steps."""

Tensors: TypeAlias = Mapping[str, Tensor]
"""By PEFT's names: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight."""


def peft_config(lora: LoraConfig, model: str) -> peft.LoraConfig:
    """PEFT's description of an adapter of the model in folder `model`, by its name on the hub if it was downloaded."""
    name, revision = hub_name(Path(model)) or (model, None)
    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.targets),
        lora_dropout=lora.dropout,
        use_dora=lora.dora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=name,
        revision=revision,
    )


def initial_a(parameter_name: str, seed: int, shape: Sequence[int]) -> Tensor:
    """PEFT's initial A [r, in] (kaiming uniform with a = sqrt(5): within 1 / sqrt(in)), from the seed and the name alone,
    so that it depends on neither layout nor other adapters."""
    digest = hashlib.sha256(f"{seed}/{parameter_name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    bound = shape[1] ** -0.5
    return torch.empty(tuple(shape)).uniform_(-bound, bound, generator=generator)


def check_lora(name: str, lora: LoraConfig, available: set[str]) -> None:
    """Raise TrainerError for a target that the model does not have (PEFT ignores those while any other fits), and for what
    is not defined."""
    if unknown := sorted(set(lora.targets) - available):
        raise TrainerError(
            f"adapter {name!r}, lora.targets: expected names among {', '.join(sorted(available))}, got {', '.join(unknown)}"
        )
    if lora.dora and lora.dropout:
        raise TrainerError(f"adapter {name!r}, lora.dropout: expected 0 for DoRA, got {lora.dropout}")


def write_adapter(folder: Path, config: peft.LoraConfig, weights: Tensors, moments: Tensors) -> None:
    """`moments` has `<name>.<moment>` of every parameter that was stepped."""
    (folder / "adapter").mkdir(parents=True, exist_ok=True)
    (folder / "state").mkdir(exist_ok=True)
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    head = {name: on_cpu.pop(name) for name in VALUE_HEAD if name in on_cpu}
    save_file(on_cpu, folder / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    if head:
        save_file(head, folder / "adapter" / "value_head.safetensors")
    config.inference_mode = True
    config.save_pretrained(folder / "adapter")
    save_file(
        {name: tensor.cpu().contiguous() for name, tensor in moments.items()},
        folder / "state" / "optimizer.safetensors",
    )
    random = {"torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # dropout's
        random["cuda"] = torch.cuda.get_rng_state()
    save_file(random, folder / "state" / "rng.safetensors")


def read_adapter(folder: Path, name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Tensors, Tensors]:
    """-> weights and moments; sets torch's random state. Without `state/`, as PEFT saves an adapter, there are no moments.

    Raises TrainerError unless the weights have just these names and shapes.
    """
    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    if (head := folder / "adapter" / "value_head.safetensors").exists():
        weights |= load_file(head)
    found = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    if found != shapes:
        key = min(key for key in shapes.keys() | found.keys() if shapes.get(key) != found.get(key))
        raise TrainerError(
            f"{folder}: the adapter saved there does not fit adapter {name!r}; at {key}: expected "
            f"{shapes.get(key)}, got {found.get(key)}. Keep its lora.rank and lora.targets, and the model, of the saved run"
        )
    if not (folder / "state").exists():
        return weights, {}
    random = load_file(folder / "state" / "rng.safetensors")
    torch.set_rng_state(random["torch"])
    if "cuda" in random and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(random["cuda"])
    return weights, load_file(folder / "state" / "optimizer.safetensors")


def merged(name: str, weight: Tensor, adapter: Mapping[str, Tensor], lora: LoraConfig) -> Tensor:
    """A base weight of that Hugging Face name with the adapter, by PEFT's names, in it: W + s B A, with DoRA's magnitudes; in W's
    dtype, added up in fp32. W itself where the adapter has nothing for it."""
    prefix = f"base_model.model.{name.removesuffix('.weight')}"
    if (a := adapter.get(f"{prefix}.lora_A.weight")) is None:
        return weight
    whole = torch.addmm(weight.float(), adapter[f"{prefix}.lora_B.weight"], a, alpha=lora.alpha / lora.rank)
    if (magnitude := adapter.get(f"{prefix}.lora_magnitude_vector")) is not None:
        whole *= (magnitude / whole.norm(dim=1))[:, None]
    return whole.to(weight.dtype)
