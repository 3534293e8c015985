"""What LoRA's two kernels take in a decode step of a GPU, with vLLM's default blocks, and with those found best here.

    python benchmarks/lora_kernels.py --name h200_lora_kernels --write rlloop/engine/lora_blocks

Every product of a layer has a kernel for A (`shrink`) and one for B (`expand`). vLLM takes blocks for them from a folder, by the
GPU's name; it has none of its own, and its defaults for few tokens cut a short row into 64 parts. Here each size of `shrink` is
timed with some blocks, replayed from a CUDA graph, and the best go to `--write`. Then all of a layer's kernels of A, times the
layers, with both. As in a run there are ten slots; requests use three of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _report import Cell, Report
from trainer import SHAPES
from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_shrink, lora_shrink_op, utils

RANK = 32
SLOTS, IN_USE = 10, 3
MOST_MATRICES = 8
LAYERS = 48
NUM_TOKENS = (16, 64, 128, 256, 512, 1024)
Size = tuple[int, int]
"""Of a shrink: its input's features, and how many matrices A it has."""
Blocks = Mapping[str, Any]
vllms_choice = lora_shrink_op.get_lora_op_configs


def sizes_of(shape: Any) -> list[Size]:
    """A layer's products: q, k and v; o; gate and up; down."""
    head = shape.hidden_size // shape.num_attention_heads
    queries = shape.num_attention_heads * head
    return [(shape.hidden_size, 3), (queries, 1), (shape.hidden_size, 2), (shape.intermediate_size, 1)]


def candidates() -> list[Blocks]:
    """Few, for each is compiled for each number of matrices."""
    fixed = {"block_n": 16, "num_warps": 4, "num_ctas": 1, "num_stages": 2, "group_size_m": 8, "max_nreg": None}
    tried = itertools.product((32, 64), (64, 128), (4, 8, 16, 32))
    return [{"block_m": m, "block_k": k, "split_k": split, **fixed} for m, k, split in tried]


def microseconds(size: Size, num_tokens: int, blocks: Blocks | None) -> float:
    """Of one shrink; None: with vLLM's blocks."""
    features, number = size
    lora_shrink_op.get_lora_op_configs = (lambda *_, **__: blocks) if blocks else vllms_choice
    utils._LORA_A_PTR_DICT.clear()  # it knows tensors by their address
    meta = LoRAKernelMeta.make(SLOTS, 4096, device="cuda")
    meta.prepare_tensors(torch.arange(num_tokens, device="cuda") % IN_USE)
    arguments = meta.meta_args(num_tokens, False)
    x = torch.randn(num_tokens, features, device="cuda", dtype=torch.bfloat16)
    # Of each layer its own: together they are larger than the cache.
    shape, count = (SLOTS, 1, RANK, features), range(number)
    layers = [[torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in count] for _ in range(LAYERS)]
    h = torch.empty(number, num_tokens, RANK, device="cuda")

    def run() -> None:
        for a in layers:
            lora_shrink(x, a, h, *arguments, 1.0)

    return replayed_microseconds(run) / LAYERS


def replayed_microseconds(run: Callable[[], object]) -> float:
    """Of what it launches, from a CUDA graph."""
    run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(5):
        graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3 / 5


def tune(sizes: Sequence[Size]) -> dict[tuple[Size, int], Blocks]:
    """The best blocks of each size and number of tokens."""
    tried = candidates()
    return {
        (size, tokens): min(tried, key=lambda blocks: microseconds(size, tokens, blocks))
        for size, tokens in itertools.product(sizes, NUM_TOKENS)
    }


def as_vllm_reads_it(best: Mapping[tuple[Size, int], Blocks]) -> dict[str, Any]:
    """slots -> matrices -> tokens -> features -> rank; of all but the matrices vLLM takes the nearest."""
    tree: dict[str, Any] = {}
    for ((features, number), tokens), blocks in best.items():
        of_tokens = tree.setdefault(str(number), {}).setdefault(str(tokens), {})
        of_tokens[str(features)] = {str(RANK): dict(blocks)}
    # Its engine would die of a layer that has more than were measured.
    return {str(SLOTS): tree | {str(number): tree["3"] for number in range(4, MOST_MATRICES + 1)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="lora_kernels", help="of the files in results/")
    parser.add_argument("--shapes", nargs="*", default=["135m", "1.5b", "8b"], choices=list(SHAPES))
    parser.add_argument("--write", type=Path, help="folder for the blocks, as vLLM reads them")
    options = parser.parse_args()
    report = Report(options.name, ["vllm", "torch"])
    shapes = {name: SHAPES[name] for name in options.shapes}
    best = tune(sorted({size for shape in shapes.values() for size in sizes_of(shape)}))
    rows: list[dict[str, Cell]] = []
    for (name, shape), tokens in itertools.product(shapes.items(), NUM_TOKENS):
        layers = shape.num_hidden_layers / 1e3
        default, chosen = (
            layers * sum(microseconds(size, tokens, best[size, tokens] if tuned else None) for size in sizes_of(shape))
            for tuned in (False, True)
        )
        ratio = f"{default / chosen:.2f}x"
        rows.append(
            {"shape": name, "tokens": tokens, "default, ms": default, "chosen, ms": chosen, "default / chosen": ratio}
        )
    report.table(f"A of all layers, rank {RANK}, {SLOTS} slots, {IN_USE} in use", rows)
    report.write()
    if options.write:
        gpu = torch.cuda.get_device_name().replace(" ", "_").replace("-", "_")
        options.write.mkdir(parents=True, exist_ok=True)
        (options.write / f"{gpu}_SHRINK.json").write_text(
            json.dumps(as_vllm_reads_it(best), separators=(",", ":")) + "\n"
        )


if __name__ == "__main__":
    main()
