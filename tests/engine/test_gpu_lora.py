"""The slots of a step's tokens: worked out on the host, they are what vLLM works out itself."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlloop.config import EngineSettings
from rlloop.engine import gpu_lora
from rlloop.engine.vllm_arguments import variables

pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore")]  # of vLLM
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
MAX_LORAS = 3
SLOTS = [7, None, 2]
"""The id of the adapter in each."""
Step = list[tuple[int, int]]
"""Of each request its adapter, 0 for none, and how many tokens it has."""
steps = st.lists(st.tuples(st.sampled_from([0, 2, 7]), st.integers(1, 5)), min_size=1, max_size=8)


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's wrapper for GPUs imports this only where Triton is."""
    from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
    from vllm.lora.punica_wrapper import punica_gpu

    monkeypatch.setattr(punica_gpu, "LoRAKernelMeta", LoRAKernelMeta, raising=False)


def make_wrapper(device: str, unwritten: int = -9) -> Any:
    from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

    config = SimpleNamespace(max_loras=MAX_LORAS, specialize_active_lora=False)
    wrapper = PunicaWrapperGPU(64, 8, device=torch.device(device), lora_config=config)
    for each in tensors(wrapper):
        each.fill_(unwritten)
    return wrapper


def tensors(wrapper: Any) -> list[torch.Tensor]:
    """Those that kernels read."""
    metas = wrapper.token_mapping_meta, wrapper.prompt_mapping_meta
    held = [item for meta in metas for item in vars(meta).items()]
    return [each for name, each in held if isinstance(each, torch.Tensor) and not name.endswith("_cpu")]


def make_manager(wrapper: Any, modules: tuple[Any, ...] = (), specialize: bool = False) -> Any:
    """What `install` asks of vLLM's."""
    return SimpleNamespace(
        modules=dict(enumerate(modules)),
        lora_config=SimpleNamespace(specialize_active_lora=specialize),
        punica_wrapper_mapping={"language_model": wrapper},
    )


def update(wrapper: Any, step: Step) -> None:
    """As vLLM's worker calls it."""
    from vllm.lora.layers import LoRAMapping

    mapping = LoRAMapping(
        index_mapping=tuple(np.int32(adapter) for adapter, number in step for _ in range(number)),
        prompt_mapping=tuple(np.int32(adapter) for adapter, _ in step),
        is_prefill=any(number > 1 for _, number in step),
    )
    wrapper.update_metadata(mapping, SLOTS, MAX_LORAS + 1, 1000)


@devices
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(several=st.lists(steps, min_size=1, max_size=4))
def test_kernels_read_what_vllm_would_have_written(device: str, several: list[Step]) -> None:
    own, wrapper = make_wrapper(device, -8), make_wrapper(device, -9)
    gpu_lora.install(make_manager(wrapper))
    for step in several:
        update(own, step)
        update(wrapper, step)
        for name, number in (
            ("token_mapping_meta", sum(number for _, number in step)),
            ("prompt_mapping_meta", len(step)),
        ):
            found, expected = getattr(wrapper, name), getattr(own, name)
            assert torch.equal(found.no_lora_flag_cpu, expected.no_lora_flag_cpu)
            if not expected.no_lora_flag_cpu:  # else no kernel reads on
                for one, other in zip(found.meta_args(number, False), expected.meta_args(number, False), strict=True):
                    assert torch.equal(one, other)


@devices
def test_nobody_waits_and_the_kernels_tensors_stay_where_they_are(device: str) -> None:
    wrapper = make_wrapper(device)
    before = [each.data_ptr() for each in tensors(wrapper)]
    gpu_lora.install(make_manager(wrapper))
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        update(wrapper, [(7, 3), (0, 1)])
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert [each.data_ptr() for each in tensors(wrapper)] == before
    assert wrapper.token_mapping_meta.token_lora_mapping[:4].tolist() == [0, 0, 0, -1]
    assert wrapper.token_mapping_meta.lora_token_start_loc.tolist() == [0, 1, 4, 0, 0]


def test_vllms_own_stays_where_more_of_it_is_read() -> None:
    from vllm.lora.layers import VocabParallelEmbeddingWithLoRA

    embedding = VocabParallelEmbeddingWithLoRA.__new__(VocabParallelEmbeddingWithLoRA)
    for manager in (
        make_manager(make_wrapper("cpu"), modules=(embedding,)),
        make_manager(make_wrapper("cpu"), specialize=True),
    ):
        gpu_lora.install(manager)
        [wrapper] = manager.punica_wrapper_mapping.values()
        assert "update_metadata" not in vars(wrapper)


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [8, 32, 64])
@pytest.mark.parametrize("features", [576, 1536, 2048, 14336])
def test_a_kernel_with_our_blocks_computes_the_product(
    features: int, rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vllms_blocks: Any
) -> None:
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_shrink

    ours = variables(EngineSettings(), tmp_path / "log", None, 1, ())
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", ours["VLLM_TUNED_CONFIG_FOLDER"])
    if torch.cuda.get_device_name() != "NVIDIA H200":
        pytest.skip(f"there are blocks for an NVIDIA H200, not for a {torch.cuda.get_device_name()}")
    assert vllms_blocks.load_lora_op_config("shrink", None)
    for number, num_tokens in product((1, 2, 3, 5), (1, 33, 64, 200, 600, 2000)):
        vllms_blocks._LORA_A_PTR_DICT.clear()  # it knows tensors by their address
        matrices = [torch.randn(MAX_LORAS, 1, rank, features, device="cuda").bfloat16() for _ in range(number)]
        x = torch.randn(num_tokens, features, device="cuda").bfloat16()
        slots = MAX_LORAS - 1 - torch.arange(num_tokens, device="cuda") % (MAX_LORAS + 1)  # -1: no adapter
        meta = LoRAKernelMeta.make(MAX_LORAS, 4096, device="cuda")
        meta.prepare_tensors(slots)
        h = torch.full((number, num_tokens, rank), torch.nan, device="cuda")
        lora_shrink(x, matrices, h, *meta.meta_args(num_tokens, False), 1.0)
        of_a_slot, has_one = torch.arange(num_tokens, device="cuda"), slots >= 0
        for found, a in zip(h, matrices, strict=True):
            wanted = (x.float() @ a[:, 0].float().mT)[slots, of_a_slot]
            assert (found - wanted)[has_one].abs().max() < 1e-3 * features**0.5
