"""The adapter merged into the model's own weights, W = W0 + B A, between two forward passes (B comes scaled).

The engine has no LoRA layers then, which cost each decode step some; but it serves one version at a time, and requests in flight
go on with the new one. W0 is kept: versions do not add up their rounding, and a zero adapter gives W0 back to the bit.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from rlloop.refit.arrivals import Arrivals
from rlloop.refit.digest import digest
from rlloop.refit.slots import Layers, Manifest, Shares, find_places, split


class Merged:
    """Of one worker. Raises ValueError, before it writes anything, on an adapter that does not fit the model."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        runner = worker.model_runner
        self._arrivals = Arrivals(runner.device, runner.model_config.dtype)
        self._manifest: Manifest = []
        self._weights: _Weights | None = None
        self._flat = torch.empty(0)

    def load(self, version: int, ticket: dict[str, Any]) -> dict[str, Any]:
        """Take it, and see that it came whole; `swap` writes it."""
        with self._arrivals.stream():
            started = time.monotonic()
            self._flat = self._arrivals.take(ticket)
            transferred = self._arrivals.now()
            found = digest(self._flat, ticket["manifest"])
        if ticket["manifest"] != self._manifest:
            self._weights = self._make_weights(ticket["manifest"])
            self._manifest = ticket["manifest"]
        return {
            "digest": found,
            "different": None,
            "transfer_seconds": transferred - started,
            "load_seconds": 0.0,
            "verify_seconds": time.monotonic() - transferred,
        }

    def _make_weights(self, manifest: Manifest) -> _Weights:
        if self._flat.device.type == "cpu":
            return Reloaded(self._worker, manifest)
        if isinstance(self._weights, InPlace):  # of a run before this one
            self._weights.restore()
        model = self._worker.model_runner.get_model()
        return InPlace(model, lora_layers(model), manifest)

    def swap(self) -> dict[str, Any]:
        """Write it, behind the forward pass that may be running; what was sent may be overwritten when this returns."""
        assert self._weights is not None
        swapped_at = time.monotonic()
        self._weights.write(self._flat)
        if self._flat.is_cuda:
            torch.cuda.synchronize(self._flat.device)
        return {"swapped_at": swapped_at}


class _Weights(Protocol):
    def write(self, flat: torch.Tensor) -> None:
        """An adapter, all of whose tensors are there."""
        ...


@dataclass(frozen=True, slots=True)
class _Target:
    """One adapted weight, or this tensor-parallel rank's part of it."""

    weight: torch.Tensor
    """[out, in], a view of what the kernels read."""
    base: torch.Tensor
    """W0."""
    a: int
    b: int
    """Places of A and B in the manifest."""


class InPlace:
    """Into the parameters that the kernels read. Their addresses stay, and so CUDA graphs go on working."""

    def __init__(self, model: torch.nn.Module, layers: Layers, manifest: Manifest) -> None:
        self._manifest = manifest
        self._places = find_places(layers, model, [name for name, _ in manifest])
        self._shares = Shares(self._places, manifest, are_sharded=True)
        parts = self._shares.of_each([torch.empty(*shape, device="meta") for _, shape in manifest])
        pairs: dict[tuple[int, int], dict[bool, int]] = {}
        for number, (layer, index, is_a) in enumerate(self._places):
            pairs.setdefault((id(layer), index), {})[is_a] = number
        self._targets = [self._target(parts, pair[True], pair[False]) for pair in pairs.values()]

    @torch.no_grad()
    def write(self, flat: torch.Tensor) -> None:
        """Rounded once: W0 and the products are added up in fp32."""
        parts = self._shares.of(flat)
        for target in self._targets:
            torch.addmm(target.base, parts[target.b], parts[target.a], out=target.weight)

    def restore(self) -> None:
        """The base model."""
        for target in self._targets:
            target.weight.copy_(target.base)

    def _target(self, parts: Sequence[torch.Tensor], a: int, b: int) -> _Target:
        layer, index, _ = self._places[a]
        weight: torch.Tensor = layer.base_layer.weight.detach()
        start = sum(layer.output_slices[:index])
        weight = weight[start : start + len(parts[b])]
        if not weight.is_floating_point() or (len(parts[b]), *parts[a].shape[1:]) != weight.shape:
            raise ValueError(
                f"{self._manifest[a][0]} is {list(parts[a].shape)} and B {list(parts[b].shape)}, but the model's weight "
                f"{list(weight.shape)} of {weight.dtype}"
            )
        return _Target(weight, weight.clone(), a, b)


class Reloaded:
    """Through vLLM's loader, which packs weights for the kernels of a CPU; W0 is read from the model's files each time."""

    def __init__(self, worker: Any, manifest: Manifest) -> None:
        self._worker, self._manifest = worker, manifest
        self._names = [name.removeprefix("base_model.model.") for name, _ in manifest]
        shapes: dict[str, list[int]] = {
            name: list(shape) for name, (_, shape) in zip(self._names, manifest, strict=True)
        }
        for name, weight in _saved_weights(worker):
            a, b = _of(shapes, name)
            if (a or b) and not (a and b and [b[0], a[1]] == list(weight.shape)):
                raise ValueError(f"{name}: A is {a} and B {b}, but the model's weight {list(weight.shape)}")
        if shapes:
            raise ValueError(f"{len(shapes)} tensors belong to no weight of the model, for example {list(shapes)[:3]}")

    @torch.no_grad()
    def write(self, flat: torch.Tensor) -> None:
        """All weights, with A and B added to those that have them."""
        named = dict(zip(self._names, split(flat, self._manifest), strict=True))

        def weights() -> Iterator[tuple[str, torch.Tensor]]:
            for name, weight in _saved_weights(self._worker):
                a, b = _of(named, name)
                yield name, weight if a is None or b is None else torch.addmm(weight.to(a.dtype), b, a)

        self._worker.reload_weights(weights_iterator=weights())


def _of(named: dict[str, Any], weight: str) -> tuple[Any, Any]:
    """A's and B's of a weight, taken out; None where it has none."""
    module = weight.removesuffix(".weight")
    return named.pop(f"{module}.lora_A.weight", None), named.pop(f"{module}.lora_B.weight", None)


def lora_layers(model: Any) -> Layers:
    """vLLM's LoRA layers for a model's linear ones, of which they only say where A and B belong: the model is as it was."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.utils import from_layer, process_packed_modules_mapping
    from vllm.model_executor.layers.linear import LinearBase

    packed = process_packed_modules_mapping(model)
    config = LoRAConfig(max_lora_rank=8, max_loras=1, lora_dtype=torch.bfloat16)
    layers: dict[str, tuple[Any, int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, LinearBase):
            parent, _, own = name.rpartition(".")
            parts = packed.get(own, [])
            layer = from_layer(module, 1, config, parts, model.config)
            if layer is not module:
                layer.lora_a_stacked = layer.lora_b_stacked = ()
                layers |= {f"{parent}.{part}": (layer, index) for index, part in enumerate(parts or [own])}
    return layers


def _saved_weights(worker: Any) -> Iterator[tuple[str, torch.Tensor]]:
    from vllm.model_executor.model_loader import get_model_loader

    loader: Any = get_model_loader(worker.vllm_config.load_config)
    yield from loader.get_all_weights(worker.model_runner.model_config, worker.model_runner.get_model())
