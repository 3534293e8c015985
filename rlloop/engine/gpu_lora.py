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

Write = tuple[torch.Tensor, np.ndarray]
"""Where to, from its first element on, and what."""


def install(wrapper: Any) -> None:
    """Replace what one of vLLM's wrappers (`PunicaWrapperGPU`) does when the adapters of a step are not those of the last."""
    wrapper._embeddings_indices.zero_()
    embeddings = wrapper._embeddings_indices.view(-1, wrapper._token_lora_indices.shape[0])[
        -1
    ]  # vLLM 0.26 has two rows

    def update_metadata(mapping: Any, slots: Sequence[int | None], max_loras: int, vocab_size: int, **_: Any) -> None:
        """`slots`: the adapter in each. `max_loras`: with the one that stands for none."""
        slot_of = {0: -1} | {adapter: slot for slot, adapter in enumerate(slots) if adapter is not None}
        tokens = np.array([slot_of[adapter] for adapter in mapping.index_mapping])
        samples = np.array([slot_of[adapter] for adapter in mapping.prompt_mapping])
        padded = np.where(samples < 0, max_loras - 1, samples) * len(samples) + np.arange(len(samples))
        wrapper.is_prefill = mapping.is_prefill
        wrapper.indices_len[:] = len(tokens), len(samples), len(samples), len(tokens)
        writes = [
            (wrapper._token_lora_indices, tokens),
            (wrapper._sampler_indices, samples),
            (wrapper._sampler_indices_padded, padded),
            (embeddings, np.maximum(tokens, 0) * vocab_size),
        ]
        for meta, each in ((wrapper.token_mapping_meta, tokens), (wrapper.prompt_mapping_meta, samples)):
            meta.no_lora_flag_cpu[0] = bool((each < 0).all())
            writes += _by_slot(meta, each)
        _carry_out(writes)

    wrapper.update_metadata = update_metadata


def _by_slot(meta: Any, slots: np.ndarray) -> list[Write]:
    """For the kernels, which take an adapter's tokens together; -1 is none. How many adapters there are they do not ask."""
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


def _carry_out(writes: Sequence[Write]) -> None:
    """In one transfer, for which nobody waits."""
    flat = torch.from_numpy(np.concatenate([what for _, what in writes]))
    device = writes[0][0].device
    if device.type == "cuda":
        flat = flat.pin_memory().to(device, non_blocking=True)
    sizes = [len(what) for _, what in writes]
    torch._foreach_copy_([to[:size] for (to, _), size in zip(writes, sizes, strict=True)], list(flat.split(sizes)))
