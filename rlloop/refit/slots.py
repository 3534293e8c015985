"""vLLM's adapter slots, written to directly.

vLLM's own way (`LoRAModel.from_lora_tensors`, `add_adapter`, `activate_adapter`) builds an object for each tensor, packs them,
clears the slot and copies each: some 1,400 kernels and 11 ms for an 8B model. Where a tensor belongs in a slot does not change
from version to version, so the views are made once, and a load is a few kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlloop.engine import vllm_compat
from rlloop.engine.flights import HOPPING_ID
from rlloop.recorded import Recorded
from rlloop.refit.transports import split
from rlloop.types import Manifest

Place = tuple[Any, int, bool]
"""vLLM's LoRA layer, index of its slice (q, k and v are slices of one layer), whether the tensor is A."""
Layers = Mapping[str, tuple[Any, int]]
"""vLLM's LoRA layer and the slice of it, by the name that the slice has in a checkpoint."""


@dataclass
class Slot:
    """One that holds zeros where no tensor of the present arrangement lies."""

    views: list[torch.Tensor]
    """In the manifest's order."""
    filled_from: Sequence[torch.Tensor]
    fill: Recorded[None]
    check: Recorded[torch.Tensor]
    """Reads it back."""


class Slots:
    """Of one worker's `LoRAModelManager`; raises ValueError, with the slots as they were, on anything vLLM would ignore."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._layers: Layers = {
            part: (layer, index)
            for name, layer in manager.modules.items()
            for index, part in enumerate(manager.packed_modules.get(name, [name]))
        }
        self.are_sharded = any(vllm_compat.num_shards(layer) > 1 for layer, _ in self._layers.values())
        """Each of several tensor-parallel ranks holds a part of every A or B."""
        self.manifest: Manifest = []
        """Of the adapters that have the present arrangement."""
        self._places: list[Place] = []
        self._slots: dict[int, Slot] = {}
        self.shares = Shares([], [], are_sharded=False)

    def arrange(self, manifest: Manifest) -> None:
        """Get to know an adapter's tensors."""
        if manifest != self.manifest:
            self._places = find_places(self._layers, self._manager.model, [name for name, _ in manifest])
            self.shares = Shares(self._places, manifest, are_sharded=self.are_sharded)
            self.manifest = manifest
            self._slots.clear()

    def check_free(self, adapter_id: int) -> None:
        """`adapter_id` is not loaded, and there is a slot for it."""
        held = self._manager.list_adapters()
        if adapter_id in held:
            raise ValueError(f"policy version {adapter_id - 1} is loaded already; a version is immutable")
        if len(held) >= self._manager.lora_slots:
            versions = sorted(each - 1 for each in held if each != HOPPING_ID)
            raise ValueError(f"all {len(versions)} adapter slots hold policy versions {versions}; retire one first")

    def fill(self, adapter_id: int, parts: Sequence[torch.Tensor]) -> Slot:
        """Copy them into the adapter's slot, or a free one; -> that slot."""
        slots = self._manager.lora_index_to_id
        index = slots.index(adapter_id if adapter_id in slots else None)
        slot = self._slots.get(index)
        if slot is None:
            for layer in self._manager.modules.values():
                layer.reset_lora(index)
            views = [
                _view(place, index, name, part)
                for place, (name, _), part in zip(self._places, self.manifest, parts, strict=True)
            ]
            device = parts[0].device
            slot = self._slots[index] = Slot(views, (), Recorded(device), Recorded(device))
        if parts is not slot.filled_from:
            slot.filled_from, slot.fill = parts, Recorded(parts[0].device)
        slot.fill(lambda: torch._foreach_copy_(slot.views, list(parts)))
        if slots[index] is None:
            vllm_compat.occupy_slot(self._manager, index, adapter_id)
        return slot


def find_places(layers: Layers, model: Any, names: Sequence[str]) -> list[Place]:
    """Where PEFT's tensors belong in vLLM's model. Raises ValueError for names without a layer, and for an A or B alone."""
    from vllm.lora.utils import parse_fine_tuned_lora_name

    mapper = vllm_compat.rename_mapper(model)
    found = [parse_fine_tuned_lora_name(name, mapper) for name in names]
    if unknown := sorted({module for module, _ in found} - layers.keys()):
        raise ValueError(f"{len(unknown)} modules have no LoRA layer in this engine, for example {unknown[:3]}")
    if halves := {m for m, is_a in found if is_a} ^ {m for m, is_a in found if not is_a}:
        raise ValueError(f"{len(halves)} modules came with only one of A and B, for example {sorted(halves)[:3]}")
    return [(*layers[module], is_a) for module, is_a in found]


class Shares:
    """What of an adapter's tensors belongs to this tensor-parallel rank."""

    def __init__(self, places: Sequence[Place], manifest: Manifest, *, are_sharded: bool) -> None:
        self._places, self._manifest, self._are_sharded = places, manifest, are_sharded
        self._flat = torch.empty(0)
        self._parts: list[torch.Tensor] = []

    def of(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """In the manifest's order. Where they are views of the flat tensor, as they mostly are, they are worked out once for each
        that comes, for that takes milliseconds."""
        if (flat.data_ptr(), flat.numel()) != (self._flat.data_ptr(), self._flat.numel()):
            self._parts = self.of_each(split(flat, self._manifest))
            storage = flat.untyped_storage().data_ptr()
            are_views = all(part.untyped_storage().data_ptr() == storage for part in self._parts)
            self._flat = flat if are_views else torch.empty(0)  # kept, so that no other tensor gets its address
        return self._parts

    def of_each(self, whole: list[torch.Tensor]) -> list[torch.Tensor]:
        """Of whole tensors. Views, but where vLLM cuts them out of one that is fused in the model's files, too."""
        if not self._are_sharded:
            return whole
        return [
            _shard(place, name, each)
            for place, (name, _), each in zip(self._places, self._manifest, whole, strict=True)
        ]


def first_difference(manifest: Manifest, sent: Sequence[torch.Tensor], held: Sequence[torch.Tensor]) -> str | None:
    """The name of a tensor of which a slot does not hold the very bits that were sent."""
    if torch.equal(_bits(sent), _bits(held)):
        return None
    return next(
        name
        for (name, _), one, other in zip(manifest, sent, held, strict=True)
        if not _bits([one]).equal(_bits([other]))
    )


def _bits(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([each.reshape(-1) for each in tensors]).view(torch.uint8)


def _shard(place: Place, name: str, whole: torch.Tensor) -> torch.Tensor:
    layer, index, is_a = place
    shard = layer.slice_lora_a if is_a else layer.slice_lora_b
    slices: list[torch.Tensor | None] = [None] * layer.n_slices
    slices[index] = whole
    own: torch.Tensor = shard(whole) if layer.n_slices == 1 else shard(slices)[index]
    for size, part in zip(whole.shape, own.shape, strict=True):
        if not part or size % part or size // part > layer.tp_size:  # vLLM would cut off what is too much
            raise ValueError(f"{name} is {list(whole.shape)}, of which {list(own.shape)} is not a tensor-parallel part")
    return own


def _view(place: Place, slot: int, name: str, part: torch.Tensor) -> torch.Tensor:
    layer, index, is_a = place
    stacked = (layer.lora_a_stacked if is_a else layer.lora_b_stacked)[index][slot, 0]
    rank, size = part.shape if is_a else reversed(part.shape)
    room, expected = stacked.shape if is_a else reversed(stacked.shape)
    if rank > room or size != expected:
        raise ValueError(f"{name} is {list(part.shape)}, but its layer's slots are {list(stacked.shape)}")
    view: torch.Tensor = stacked[: part.shape[0], : part.shape[1]]
    return view
