"""Which slot each token of a step has, worked out on the host.

Where the requests of a step are not those of the step before, as with rollouts that come and go, vLLM works it out on the GPU and
asks there whether any adapter is in use, and how many. The answers wait for all that the GPU has to do, above all the step
before, beside which the next one should be prepared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def install(manager: Any) -> None:
    """Replace what the wrappers of a `LoRAModelManager` do when a step's adapters are not those of the last: `PunicaWrapperGPU`s.

    They stay as they are where more is read of what vLLM works out, by embeddings with adapters and for `specialize_active_lora`.
    """
    from vllm.lora.layers import VocabParallelEmbeddingWithLoRA

    has_embedding = any(isinstance(layer, VocabParallelEmbeddingWithLoRA) for layer in manager.modules.values())
    if not has_embedding and not manager.lora_config.specialize_active_lora:
        for wrapper in manager.punica_wrapper_mapping.values():
            wrapper.update_metadata = _Update(wrapper)


class _Update:
    """In the place of a wrapper's `update_metadata`."""

    def __init__(self, wrapper: Any) -> None:
        self._metas = wrapper.token_mapping_meta, wrapper.prompt_mapping_meta

    def __call__(self, mapping: Any, slots: Sequence[int | None], *_: Any, **__: Any) -> None:
        """`slots`: the adapter in each; `mapping`: that of each token, and of each request, 0 for none."""
        slot_of = {0: -1} | {adapter: slot for slot, adapter in enumerate(slots) if adapter is not None}
        writes: list[tuple[torch.Tensor, np.ndarray]] = []
        for meta, adapters in zip(self._metas, (mapping.index_mapping, mapping.prompt_mapping), strict=True):
            chosen = np.array([slot_of[adapter] for adapter in adapters])
            meta.no_lora_flag_cpu[0] = bool((chosen < 0).all())
            writes += _by_slot(meta, chosen)
        # In one transfer, for which nobody waits; in the tensors' own type, for from another one torch copies each by itself, or
        # wrongly (pytorch #173383).
        flat = torch.from_numpy(np.concatenate([numbers for _, numbers in writes], dtype=np.int32, casting="same_kind"))
        device = writes[0][0].device
        if device.type == "cuda":
            flat = flat.pin_memory().to(device, non_blocking=True)
        sizes = [len(numbers) for _, numbers in writes]
        targets = [tensor[:size] for (tensor, _), size in zip(writes, sizes, strict=True)]
        torch._foreach_copy_(targets, list(flat.split(sizes)))


def _by_slot(meta: Any, slots: np.ndarray) -> list[tuple[torch.Tensor, np.ndarray]]:
    """What goes where, from the first element on, for the kernels, which take an adapter's tokens together; -1 is none."""
    found, counts = np.unique(slots, return_counts=True)
    active = np.full(len(meta.active_lora_ids), -1)
    numbers, starts = np.zeros(len(meta.num_tokens_per_lora), int), np.zeros(len(meta.lora_token_start_loc), int)
    active[: len(found)], numbers[: len(found)], starts[1 : len(found) + 1] = found, counts, counts.cumsum()
    return [
        (meta.token_lora_mapping, slots),
        (meta.token_indices_sorted_by_lora_ids, slots.argsort(kind="stable")),
        (meta.active_lora_ids, active),
        (meta.num_tokens_per_lora, numbers),
        (meta.lora_token_start_loc, starts),
    ]
