"""vLLM's adapter slots, written to directly.

vLLM's own way (`LoRAModel.from_lora_tensors`, `add_adapter`, `activate_adapter`) builds an object for each tensor, packs them,
clears the slot and copies each: some 1,400 kernels and 11 ms for an 8B model. Where a tensor belongs in a slot does not change
from version to version, so the views are made once, and a load is a few kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rlloop.engine import vllm_compat

Manifest = Sequence[tuple[str, Sequence[int]]]
"""PEFT's name and the shape of each tensor, as an AdapterTicket has it."""
Place = tuple[Any, int, bool]
"""vLLM's LoRA layer, index of its slice (q, k and v are slices of one layer), whether the tensor is A."""


class Slots:
    """Of one worker's `LoRAModelManager`; raises ValueError, with the slots as they were, on anything vLLM would ignore."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._layers = {
            part: (layer, index)
            for name, layer in manager.modules.items()
            for index, part in enumerate(manager.packed_modules.get(name, [name]))
        }
        self._manifest: Manifest = []
        self._places: list[Place] = []
        self._views: dict[int, list[torch.Tensor]] = {}
        """By slot, in the manifest's order; only for slots that hold zeros elsewhere."""

    def arrange(self, manifest: Manifest) -> None:
        """Get to know an adapter's tensors."""
        if manifest != self._manifest:
            self._places = self._find_places([name for name, _ in manifest])
            self._manifest = manifest
            self._views.clear()

    def check_free(self, adapter_id: int) -> None:
        """`adapter_id` is not loaded, and there is a slot for it."""
        held = sorted(each - 1 for each in self._manager.list_adapters())
        if adapter_id - 1 in held:
            raise ValueError(f"policy version {adapter_id - 1} is loaded already; a version is immutable")
        if len(held) >= self._manager.lora_slots:
            raise ValueError(
                f"all {self._manager.lora_slots} adapter slots hold policy versions {held}; retire one first"
            )

    def fill(self, adapter_id: int, flat: torch.Tensor) -> list[torch.Tensor]:
        """Copy it into a free slot; -> what that holds now, tensors in the manifest's order."""
        slot = self._manager.lora_index_to_id.index(None)
        if slot not in self._views:
            for layer in self._manager.modules.values():
                layer.reset_lora(slot)
            self._views[slot] = [
                _view(place, slot, name, shape)
                for place, (name, shape) in zip(self._places, self._manifest, strict=True)
            ]
        torch._foreach_copy_(self._views[slot], _pieces(flat, self._manifest))
        vllm_compat.occupy_slot(self._manager, slot, adapter_id)
        return self._views[slot]

    def _find_places(self, names: list[str]) -> list[Place]:
        from vllm.lora.utils import parse_fine_tuned_lora_name

        mapper = vllm_compat.rename_mapper(self._manager.model)
        found = [parse_fine_tuned_lora_name(name, mapper) for name in names]
        if unknown := sorted({module for module, _ in found} - self._layers.keys()):
            raise ValueError(f"{len(unknown)} modules have no LoRA layer in this engine, for example {unknown[:3]}")
        if halves := {m for m, is_a in found if is_a} ^ {m for m, is_a in found if not is_a}:
            raise ValueError(f"{len(halves)} modules came with only one of A and B, for example {sorted(halves)[:3]}")
        return [(*self._layers[module], is_a) for module, is_a in found]


def first_difference(manifest: Manifest, flat: torch.Tensor, held: Sequence[torch.Tensor]) -> str | None:
    """The name of a tensor that a slot does not hold as it was sent."""
    pairs = zip(manifest, _pieces(flat, manifest), held, strict=True)
    return next((name for (name, _), sent, other in pairs if not sent.equal(other)), None)


def _pieces(flat: torch.Tensor, manifest: Manifest) -> list[torch.Tensor]:
    sizes = [rows * columns for _, (rows, columns) in manifest]
    return [piece.view(*shape) for piece, (_, shape) in zip(flat.split(sizes), manifest, strict=True)]


def _view(place: Place, slot: int, name: str, shape: Sequence[int]) -> torch.Tensor:
    layer, index, is_a = place
    stacked = (layer.lora_a_stacked if is_a else layer.lora_b_stacked)[index][slot, 0]
    rank, size = shape if is_a else reversed(shape)
    room, expected = stacked.shape if is_a else reversed(stacked.shape)
    if rank > room or size != expected:
        raise ValueError(f"{name} is {list(shape)}, but its layer's slots are {list(stacked.shape)}")
    view: torch.Tensor = stacked[: shape[0], : shape[1]]
    return view
