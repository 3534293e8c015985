"""What rlloop adds to vLLM's workers: load an adapter from memory, read back what a slot holds, drop it.

vLLM mixes this class into its worker (`worker_extension_cls`); `collective_rpc` calls the methods on every rank, between
two forward passes. vLLM itself checks almost nothing here: names that no layer serves, or an A without its B, are skipped
in silence, and the base model is sampled. So everything is checked before the load, and read back after it.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from rlloop.engine import cpu_lora
from rlloop.engine.vllm_compat import rename_mapper
from rlloop.refit.digest import digest
from rlloop.refit.transports import Reader

Place = tuple[str, bool]  # module as PEFT names it, whether the tensor is A


class LoraRefit:
    """Methods are prefixed, because an attribute that vLLM's worker has already trips an assertion."""

    model_runner: Any

    def refit_load(self, version: int, ticket: dict[str, Any]) -> dict[str, Any]:
        """Load a version into a free slot. Raises ValueError, with the slots as they were, on anything vLLM would ignore."""
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.peft_helper import PEFTHelper
        from vllm.lora.utils import parse_fine_tuned_lora_name

        worker = self.model_runner.lora_manager
        manager, device, dtype = worker._adapter_manager, worker.device, worker.lora_config.lora_dtype
        adapter_id = version + 1
        if device.type == "cpu":
            cpu_lora.install()
        self._refit_check_slot(version, ticket, manager, dtype)
        mapper = rename_mapper(manager.model)
        places = [parse_fine_tuned_lora_name(name, mapper) for name, _ in ticket["manifest"]]
        self._refit_check_names(places, manager)

        started = time.monotonic()
        state = self._refit_state
        free = state["free"].pop() if state["free"] and state["free"][-1].nbytes == ticket["num_bytes"] else None
        flat = state["reader"].read(ticket, free)
        pieces = torch.split(flat, [rows * columns for _, (rows, columns) in ticket["manifest"]])
        tensors = {name: piece.view(*shape) for (name, shape), piece in zip(ticket["manifest"], pieces, strict=True)}
        if device.type == "cuda":
            torch.cuda.synchronize()
        transferred = time.monotonic()

        peft = {"r": ticket["rank"], "lora_alpha": ticket["rank"], "bias": "none"}  # the scale is in B already
        helper = PEFTHelper.from_dict({**peft, "target_modules": sorted({m.rsplit(".", 1)[-1] for m, _ in places})})
        helper.validate_legal(worker.lora_config)
        lora = LoRAModel.from_lora_tensors(
            lora_model_id=adapter_id,
            tensors=tensors,
            peft_helper=helper,
            device=str(device),
            dtype=dtype,
            model_vocab_size=worker.vocab_size,
            weights_mapper=mapper,
        )
        try:
            manager.add_adapter(lora)  # packs q, k, v and gate, up
            manager.activate_adapter(adapter_id)  # copies into the slot
            manager.pin_adapter(adapter_id)  # or the cache may evict it under requests in flight, and the engine dies
        except Exception:
            manager.remove_adapter(adapter_id)
            raise
        if device.type == "cuda":
            torch.cuda.synchronize()
        loaded = time.monotonic()
        state["loaded"][version] = flat
        contents = self._refit_slot_contents(adapter_id, places, ticket["manifest"])
        held = digest(contents, ticket["manifest"])
        return {
            "digest": held,
            "transfer_seconds": transferred - started,
            "load_seconds": loaded - transferred,
            "verify_seconds": time.monotonic() - loaded,
        }

    def refit_drop(self, version: int) -> bool:
        """Free a version's slot, and keep its memory for the next version."""
        if version in self._refit_state["loaded"]:
            self._refit_state["free"] = [self._refit_state["loaded"].pop(version)]
        return self.model_runner.lora_manager.remove_adapter(version + 1)

    @property
    def _refit_state(self) -> dict[str, Any]:
        if "_refit_state_" not in self.__dict__:
            reader = Reader(self.model_runner.lora_manager.device)
            self._refit_state_: dict[str, Any] = {"reader": reader, "loaded": {}, "free": [], "contents": None}
        return self._refit_state_

    def _refit_check_slot(self, version: int, ticket: dict[str, Any], manager: Any, dtype: torch.dtype) -> None:
        held = sorted(adapter_id - 1 for adapter_id in manager.list_adapters())
        if version in held:
            raise ValueError(f"policy version {version} is loaded already; a version is immutable")
        if len(held) >= manager.lora_slots:
            raise ValueError(f"all {manager.lora_slots} adapter slots hold policy versions {held}; retire one first")
        if f"torch.{ticket['dtype']}" != str(dtype):
            raise ValueError(f"the adapter came as {ticket['dtype']}, this engine's slots are {dtype}")

    @staticmethod
    def _refit_layers(manager: Any) -> dict[str, tuple[Any, int]]:
        """Module as PEFT names it -> (vLLM's LoRA layer, index of its slice)."""
        return {
            part: (layer, index)
            for name, layer in manager.modules.items()
            for index, part in enumerate(manager.packed_modules.get(name, [name]))
        }

    def _refit_check_names(self, places: list[Place], manager: Any) -> None:
        if unknown := sorted({module for module, _ in places} - self._refit_layers(manager).keys()):
            raise ValueError(f"{len(unknown)} modules have no LoRA layer in this engine, for example {unknown[:3]}")
        halves = {m for m, is_a in places if is_a} ^ {m for m, is_a in places if not is_a}
        if halves:
            raise ValueError(f"{len(halves)} modules came with only one of A and B, for example {sorted(halves)[:3]}")

    def _refit_slot_contents(self, adapter_id: int, places: list[Place], manifest: list[Any]) -> torch.Tensor:
        """What the slot that requests use holds now, flat, in the manifest's order. Whole tensors, so tensor parallel is 1."""
        manager = self.model_runner.lora_manager._adapter_manager
        slot, layers = manager.lora_index_to_id.index(adapter_id), self._refit_layers(manager)
        found = []
        for (module, is_a), (_, (rows, columns)) in zip(places, manifest, strict=True):
            layer, index = layers[module]
            stacked = layer.lora_a_stacked if is_a else layer.lora_b_stacked
            found.append(stacked[index][slot, 0, :rows, :columns].reshape(-1))
        num_elements = sum(part.numel() for part in found)
        contents = self._refit_state["contents"]
        if contents is None or contents.numel() != num_elements:
            self._refit_state["contents"] = contents = torch.empty(
                num_elements, dtype=found[0].dtype, device=found[0].device
            )
        return torch.cat(found, out=contents)
