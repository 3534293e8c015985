"""What vLLM is started with on GPUs, as a table."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from rlloop.config import EngineSettings
from rlloop.engine.vllm_arguments import device_arguments, gpu_order, variables
from rlloop.errors import ConfigError


@pytest.fixture(autouse=True)
def gpu_of_100_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlloop.engine.vllm_arguments.gpu_bytes", lambda: 100 * 10**9)


def test_vllm_gets_less_where_base_weights_are_kept_beside_the_merged_ones() -> None:
    settings = EngineSettings(gpu_memory_utilization=0.5)
    assert device_arguments(settings, None, 0)["gpu_memory_utilization"] == 0.5
    arguments = device_arguments(settings, None, 20 * 10**9)
    assert arguments["gpu_memory_utilization"] == pytest.approx(0.3)


def test_where_they_leave_nothing_that_is_said() -> None:
    with pytest.raises(ConfigError, match=r"keeps 50.0 GB .* --engine.gpu-memory-utilization 0.5 allows"):
        device_arguments(EngineSettings(gpu_memory_utilization=0.5), None, 50 * 10**9)


def test_a_given_kv_cache_is_what_vllm_gets() -> None:
    arguments = device_arguments(EngineSettings(kv_cache_gib=8), None, 99 * 10**9)
    assert arguments["kv_cache_memory_bytes"] == 8 << 30


def test_an_engines_gpus_come_first_and_it_sees_the_trainers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlloop.engine.vllm_arguments.visible_gpus", lambda: ["4", "5", "6", "7"])
    assert gpu_order((2, 3)) == {"CUDA_VISIBLE_DEVICES": "6,7,4,5"}
    assert gpu_order(()) == {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    monkeypatch.setattr("rlloop.engine.vllm_arguments.visible_gpus", list)
    assert gpu_order(()) == {}


@pytest.mark.parametrize("max_num_seqs", [1, 8, 64, 136, 300, 512, 1000])
def test_every_step_has_a_graph_that_pads_it_little(max_num_seqs: int) -> None:
    settings = EngineSettings(max_num_seqs=max_num_seqs)
    sizes = device_arguments(settings, None, 0)["compilation_config"]["cudagraph_capture_sizes"]
    assert max_num_seqs in sizes
    for number in range(1, 2049):
        padded = min(size for size in sizes if size >= number)
        assert padded - number < max(8, number / 8)


def test_without_graphs_there_are_no_sizes() -> None:
    assert "compilation_config" not in device_arguments(EngineSettings(enforce_eager=True), None, 0)


BLOCKS = "VLLM_TUNED_CONFIG_FOLDER"


def test_vllm_finds_blocks_for_its_lora_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vllms_blocks: Any
) -> None:
    """On an H200, for any number of slots, matrices, tokens, features and rank."""
    monkeypatch.setattr("rlloop.engine.vllm_arguments.visible_gpus", list)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setenv(BLOCKS, variables(EngineSettings(), tmp_path / "log", None, 1, ())[BLOCKS])
    for slots, matrices, tokens, features, rank in product((2, 10), range(1, 9), (1, 64, 2048), (576, 8192), (8, 256)):
        found = vllms_blocks.get_lora_op_configs("shrink", slots, tokens, features, rank, matrices)
        assert found["block_k"] * found["split_k"] <= 4096  # vLLM's own cut few tokens into parts of 16,384


def test_own_blocks_go_first_and_a_cpu_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlloop.engine.vllm_arguments.visible_gpus", list)
    monkeypatch.setenv(BLOCKS, "/mine")
    assert variables(EngineSettings(), tmp_path / "log", None, 1, ())[BLOCKS] == "/mine"
    assert BLOCKS not in variables(EngineSettings(), tmp_path / "log", frozenset({0}), 1, ())
