"""What the logprob of each sampled token takes in a decode step of a GPU, with vLLM's blocks, rlloop's and others.

    python benchmarks/logprob_kernel.py --name h200_logprob_kernel

vLLM's kernel has one program a request, which goes through the logits twice, block by block, for their greatest and for the sum
of their exponentials; then another one goes through them for the token's rank, which rlloop leaves out. Both are timed for the
vocabulary of each shape, replayed from a CUDA graph, the first with each of some blocks; beside them torch's log_softmax.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import torch
from _report import Cell, Report
from lora_kernels import replayed_microseconds
from trainer import SHAPES
from vllm.v1.worker.gpu.sample import logprob

from rlloop.engine.gpu_logprobs import OPTIONS

CALLS = 20
BLOCKS = [*itertools.product((1024, 4096, 8192, 16384), (4, 16, 32))]
"""Logits of a block, and warps."""
VLLMS, RLLOOPS = (1024, 4), (OPTIONS["BLOCK_SIZE"], OPTIONS["num_warps"])


def microseconds(compute: Callable[[], object]) -> float:
    """Of one call."""

    def several() -> None:
        for _ in range(CALLS):
            compute()

    return replayed_microseconds(several) / CALLS


def measure(vocabulary: int, number: int) -> dict[str, Cell]:
    """For so many requests."""
    logits = torch.randn(number, vocabulary, device="cuda", dtype=torch.bfloat16)
    tokens = torch.randint(vocabulary, (number, 1), device="cuda")
    expected = logits.log_softmax(-1, dtype=torch.float32).gather(-1, tokens)
    out, ranks = torch.empty_like(expected), torch.empty(number, dtype=torch.int64, device="cuda")

    def with_blocks(block: int, warps: int) -> float:
        def compute() -> None:
            logprob._topk_log_softmax_kernel[number,](
                out, logits, vocabulary, tokens, 1, vocabulary, BLOCK_SIZE=block, TOPK_BLOCK_SIZE=1, num_warps=warps
            )

        taken = microseconds(compute)
        torch.testing.assert_close(out, expected)
        return taken

    def rank() -> None:
        logprob._ranks_kernel[number,](ranks, logits, vocabulary, tokens, vocabulary, BLOCK_SIZE=8192)

    taken = {blocks: with_blocks(*blocks) for blocks in BLOCKS}
    best = min(taken, key=lambda blocks: taken[blocks])
    return {
        "vocabulary": vocabulary,
        "requests": number,
        "vLLM's, µs": taken[VLLMS],
        "rlloop's, µs": taken[RLLOOPS],
        "vLLM's / rlloop's": f"{taken[VLLMS] / taken[RLLOOPS]:.2f}x",
        "best, µs": taken[best],
        "its block and warps": f"{best[0]}, {best[1]}",
        "log_softmax, µs": microseconds(lambda: logits.log_softmax(-1, dtype=torch.float32).gather(-1, tokens)),
        "rank, µs": microseconds(rank),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="logprob_kernel", help="of the files in results/")
    parser.add_argument("--shapes", nargs="*", default=["135m", "1.5b", "8b"], choices=list(SHAPES))
    parser.add_argument("--requests", type=int, nargs="+", default=[16, 64, 256, 512])
    options = parser.parse_args()
    report = Report(options.name, ["vllm", "torch"])
    vocabularies = sorted({SHAPES[name].vocab_size for name in options.shapes})
    rows = [measure(*each) for each in itertools.product(vocabularies, options.requests)]
    report.table("logprobs of sampled tokens, logits in bfloat16", rows)
    report.write()


if __name__ == "__main__":
    main()
