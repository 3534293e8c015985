"""How long does it take to hand out what the megatron trainer has learned, by stage?

    python benchmarks/export.py                   # one H200: the shapes of Llama-3-8B, Qwen2.5-1.5B, SmolLM2-135M
    python benchmarks/export.py --shapes tiny     # on a CPU, to rehearse

    adapter, by names     the adapter's tensors by PEFT's names, in fp32, on the trainer's device
    adapter, handed over  flattened, B scaled, cast, its digest, and in shared memory
    merged weights        every weight with the adapter merged, by Hugging Face names, one after another

In the rank, after a step; the median of several times, and the first.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import torch
from _report import Report
from trainer import ADAM, CUDA, LORA, SHAPES, Shape, make_samples, policy_gradient, write_model

from rlloop.config import TrainerSettings
from rlloop.refit.transports import make_writer
from rlloop.trainer.megatron import MegatronTrainer

Row = dict[str, str | float]


class TimedRank:
    """A rank that times its exports itself."""

    def __init__(self, context: Any, **arguments: Any) -> None:
        self._rank: Any = MegatronTrainer.build_rank(context, **arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rank, name)

    def exports(self, repeats: int) -> list[Row]:
        rank = self._rank
        return [
            {"what": "adapter, by names", **timed(rank._adapters["policy"].export, repeats)},
            {"what": "adapter, handed over", **timed(partial(rank.export_adapter, "policy"), repeats)},
            {"what": "merged weights", **timed(lambda: sum(1 for _ in rank.export_weights("policy")), repeats)},
        ]


class TimedTrainer(MegatronTrainer):
    """Its rank times itself."""

    build_rank = TimedRank

    async def exports(self, repeats: int) -> list[Row]:
        """Of adapter `policy`."""
        rows: list[Row] = await self._ranks.call("exports", repeats)
        return rows


def timed(function: Callable[[], Any], repeats: int) -> dict[str, float]:
    found = []
    for _ in range(repeats):
        if CUDA:
            torch.cuda.synchronize()
        started = time.perf_counter()
        function()
        if CUDA:
            torch.cuda.synchronize()
        found.append(1e3 * (time.perf_counter() - started))
    return {"ms": statistics.median(found), "first ms": found[0]}


async def measure(folder: Path, shape: Shape, repeats: int) -> list[Row]:
    dtype = "bfloat16" if CUDA else "float32"
    trainer = TimedTrainer(
        str(folder),
        dtype=dtype,
        settings=TrainerSettings(kind="megatron", max_tokens_per_microbatch=shape.num_samples * shape.length),
        temperature=1.0,
        writer=make_writer("memory", dtype, f"rlloop-export-{os.getpid()}"),
        log_path=folder / "log",
    )
    async with trainer:
        await trainer.create_adapter("policy", LORA)
        samples = make_samples(shape, [shape.length] * shape.num_samples)
        await trainer.forward_backward("policy", samples, policy_gradient)
        await trainer.optim_step("policy", ADAM)
        return await trainer.exports(repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["8b", "1.5b", "135m"], choices=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    report = Report("export", ("torch", "megatron-core", "megatron-bridge"))
    for name in arguments.shapes:
        folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
        try:
            write_model(SHAPES[name], folder)
            torch.cuda.empty_cache()
            rows = anyio.run(measure, folder, SHAPES[name], arguments.repeats)
            report.table(f"{name}, LoRA rank {LORA.rank} on all linear layers", rows)
        finally:
            shutil.rmtree(folder)
    report.write()


if __name__ == "__main__":
    main()
