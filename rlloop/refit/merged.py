"""The adapter merged into the model's own weights, W = W0 + B A, between two forward passes (B comes scaled).

The engine has no LoRA layers then, which cost each decode step some; but it serves one version at a time, and requests in flight
go on with the new one. W0 is kept: versions do not add up their rounding, and a zero adapter gives W0 back to the bit.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlloop.recorded import Recorded
from rlloop.refit.arrivals import Arrivals
from rlloop.refit.digest import digest
from rlloop.refit.slots import Layers, Place, Shares, find_places
from rlloop.refit.transports import split
from rlloop.types import Manifest


class Merged:
    """Of one worker. Raises ValueError, before anything is written, on an adapter that does not fit the model."""

    def __init__(self, worker: Any) -> None:
        runner = worker.model_runner
        self._arrivals = Arrivals(runner.device, runner.model_config.dtype)
        self._weights: InPlace | Reloaded = Reloaded(worker)
        if runner.device.type != "cpu":
            model = runner.get_model()
            self._weights = InPlace(model, lora_layers(model), runner.model_config.dtype)
        self._flat = torch.empty(0)

    def load(self, version: int, ticket: dict[str, Any]) -> dict[str, Any]:
        """Take it, and see that it came whole and fits; `swap` writes it."""
        with self._arrivals.stream():
            started = time.monotonic()
            self._flat = self._arrivals.take(ticket)
            transferred = self._arrivals.now()
            found = digest(self._flat, ticket["manifest"])
        self._weights.arrange(ticket["manifest"])
        return {
            "digest": found,
            "different": None,
            "transfer_seconds": transferred - started,
            "load_seconds": 0.0,
            "verify_seconds": time.monotonic() - transferred,
        }

    def swap(self) -> None:
        """Write it, behind the forward pass that may be running; what was sent may be overwritten when this returns."""
        self._weights.write(self._flat)
        if self._flat.is_cuda:
            torch.cuda.synchronize(self._flat.device)


@dataclass(frozen=True, slots=True)
class _Target:
    """One adapted weight, or this tensor-parallel rank's part of it."""

    weight: torch.Tensor
    """[out, in], a view of what the kernels read."""
    a: int
    b: int
    """Places of A and B in the manifest."""


class InPlace:
    """Into the parameters that the kernels read. Their addresses stay, and so CUDA graphs go on working."""

    def __init__(self, model: torch.nn.Module, layers: Layers, dtype: torch.dtype) -> None:
        self._model, self._layers, self._dtype = model, layers, dtype
        self._manifest: Manifest = []
        self._shares = Shares([], [], are_sharded=True)
        self._targets: list[_Target] = []
        self._written: list[_Target] = []
        """Those that are not W0 now."""
        self._bases: dict[int, torch.Tensor] = {}
        """W0 of all that were ever written, by address."""
        self._parts: list[torch.Tensor] = []
        self._add = Recorded[None](torch.device("cpu"))
        """Of those parts."""

    def arrange(self, manifest: Manifest) -> None:
        """Get to know an adapter's tensors, and check that they fit; writes nothing."""
        if manifest == self._manifest:
            return
        places = find_places(self._layers, self._model, [name for name, _ in manifest])
        shares = Shares(places, manifest, are_sharded=True)
        parts = shares.of_each([torch.empty(*shape, dtype=self._dtype, device="meta") for _, shape in manifest])
        pairs: dict[tuple[int, int], dict[bool, int]] = {}
        for number, (layer, index, is_a) in enumerate(places):
            pairs.setdefault((id(layer), index), {})[is_a] = number
        self._targets = [
            _target(places[pair[True]], manifest, parts, pair[True], pair[False]) for pair in pairs.values()
        ]
        self._manifest, self._shares = manifest, shares

    @torch.no_grad()
    def write(self, flat: torch.Tensor) -> None:
        """The arranged adapter. Rounded once: W0 and the products are added up in fp32."""
        if self._written is not self._targets:  # of a run before this one
            self.restore()
            self._written = self._targets
        parts = self._shares.of(flat)
        if parts is not self._parts:
            self._parts, self._add = parts, Recorded(flat.device)
        self._add(lambda: self._write(parts))

    def _write(self, parts: Sequence[torch.Tensor]) -> None:
        for target in self._targets:
            base = self._bases.get(target.weight.data_ptr())
            if base is None:
                base = self._bases[target.weight.data_ptr()] = target.weight.clone()
            torch.addmm(base, parts[target.b], parts[target.a], out=target.weight)

    def restore(self) -> None:
        """The base model."""
        for target in self._written:
            target.weight.copy_(self._bases[target.weight.data_ptr()])
        self._written = []


def _target(place: Place, manifest: Manifest, parts: Sequence[torch.Tensor], a: int, b: int) -> _Target:
    layer, index, _ = place
    weight: torch.Tensor = layer.base_layer.weight.detach()
    start = sum(layer.output_slices[:index])
    weight = weight[start : start + len(parts[b])]
    if (len(parts[b]), *parts[a].shape[1:]) != weight.shape or weight.dtype != parts[a].dtype:
        raise ValueError(
            f"{manifest[a][0]} is {list(parts[a].shape)} and B {list(parts[b].shape)} of {parts[a].dtype}, but the model's "
            f"weight {list(weight.shape)} of {weight.dtype}"
        )
    return _Target(weight, a, b)


class Reloaded:
    """Through vLLM's loader, which packs weights for the kernels of a CPU; W0 is read from the model's files each time."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._manifest: Manifest = []
        self._names: list[str] = []

    def arrange(self, manifest: Manifest) -> None:
        """Get to know an adapter's tensors, and check that they fit; writes nothing."""
        if manifest == self._manifest:
            return
        names = [name.removeprefix("base_model.model.") for name, _ in manifest]
        shapes: dict[str, Any] = {name: list(shape) for name, (_, shape) in zip(names, manifest, strict=True)}
        for name, weight in _saved_weights(self._worker):
            a, b = _of(shapes, name)
            if (a or b) and not (a and b and [b[0], a[1]] == list(weight.shape)):
                raise ValueError(f"{name}: A is {a} and B {b}, but the model's weight {list(weight.shape)}")
        if shapes:
            raise ValueError(f"{len(shapes)} tensors belong to no weight of the model, for example {list(shapes)[:3]}")
        self._manifest, self._names = manifest, names

    @torch.no_grad()
    def write(self, flat: torch.Tensor) -> None:
        """All weights, with A and B added to those that have them."""
        named: dict[str, Any] = dict(zip(self._names, split(flat, self._manifest), strict=True))

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
            own = name.rpartition(".")[2]
            parent = name.removesuffix(own)
            parts = packed.get(own, [])
            layer = from_layer(module, 1, config, parts, model.config)
            if layer is not module:
                layer.lora_a_stacked = layer.lora_b_stacked = ()
                layers |= {f"{parent}{part}": (layer, index) for index, part in enumerate(parts or [own])}
    return layers


def _saved_weights(worker: Any) -> Iterator[tuple[str, torch.Tensor]]:
    from vllm.model_executor.model_loader import get_model_loader

    loader: Any = get_model_loader(worker.vllm_config.load_config)
    yield from loader.get_all_weights(worker.model_runner.model_config, worker.model_runner.get_model())
