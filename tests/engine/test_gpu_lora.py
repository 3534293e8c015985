"""The slots of a step's tokens: worked out on the host, they are what vLLM works out itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlloop.engine import gpu_lora

pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore")]  # of vLLM
MAX_LORAS = 3
SLOTS = [7, None, 2]
"""The id of the adapter in each."""
Step = list[tuple[int, int]]
"""Of each request its adapter, 0 for none, and how many tokens it has."""
steps = st.lists(st.tuples(st.sampled_from([0, 2, 7]), st.integers(1, 5)), min_size=1, max_size=8)


def make_wrapper(unwritten: int = -9) -> Any:
    """With its tensors on the host."""
    from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
    from vllm.lora.punica_wrapper import punica_gpu

    punica_gpu.LoRAKernelMeta = LoRAKernelMeta  # which vLLM imports there only where Triton is
    config = SimpleNamespace(max_loras=MAX_LORAS, specialize_active_lora=False)
    wrapper = punica_gpu.PunicaWrapperGPU(64, 8, device=torch.device("cpu"), lora_config=config)
    for each in tensors(wrapper):
        each.fill_(unwritten)
    return wrapper


def tensors(wrapper: Any) -> list[torch.Tensor]:
    """Those that would be on a GPU."""
    holders = wrapper, wrapper.token_mapping_meta, wrapper.prompt_mapping_meta
    held = [item for holder in holders for item in vars(holder).items()]
    return [each for name, each in held if isinstance(each, torch.Tensor) and not name.endswith("_cpu")]


def update(wrapper: Any, step: Step) -> None:
    """As vLLM's worker calls it."""
    from vllm.lora.layers import LoRAMapping

    mapping = LoRAMapping(
        index_mapping=tuple(adapter for adapter, number in step for _ in range(number)),
        prompt_mapping=tuple(adapter for adapter, _ in step),
        is_prefill=any(number > 1 for _, number in step),
    )
    wrapper.update_metadata(mapping, SLOTS, MAX_LORAS + 1, 1000)


@settings(deadline=None)
@given(st.lists(steps, min_size=1, max_size=4))
def test_kernels_read_what_vllm_would_have_written(several: list[Step]) -> None:
    own, wrapper = make_wrapper(-8), make_wrapper(-9)
    gpu_lora.install(wrapper)
    for step in several:
        update(own, step)
        update(wrapper, step)
        assert wrapper.is_prefill == own.is_prefill
        assert torch.equal(wrapper.token_lora_indices, own.token_lora_indices)
        assert torch.equal(wrapper.sampler_indices, own.sampler_indices)
        assert torch.equal(wrapper.sampler_indices_padded, own.sampler_indices_padded)
        num_tokens = sum(number for _, number in step)
        assert torch.equal(wrapper._embeddings_indices[..., :num_tokens], own._embeddings_indices[..., :num_tokens])
        for name in ("token_mapping_meta", "prompt_mapping_meta"):
            found, expected = getattr(wrapper, name), getattr(own, name)
            assert torch.equal(found.no_lora_flag_cpu, expected.no_lora_flag_cpu)
            if not expected.no_lora_flag_cpu:  # else no kernel reads on
                number = num_tokens if name == "token_mapping_meta" else len(step)
                for one, other in zip(found.meta_args(number, False), expected.meta_args(number, False), strict=True):
                    assert torch.equal(one, other)


def test_the_kernels_tensors_stay_where_they_are() -> None:
    wrapper = make_wrapper()
    before = [each.data_ptr() for each in tensors(wrapper)]
    gpu_lora.install(wrapper)
    update(wrapper, [(7, 3), (0, 1)])
    assert [each.data_ptr() for each in tensors(wrapper)] == before
    assert wrapper.token_lora_indices.tolist() == [0, 0, 0, -1]
    assert wrapper.token_mapping_meta.lora_token_start_loc.tolist() == [0, 1, 4, 0, 0]
