"""How well do pipeline stages overlap, and what did each of them do when?

    python benchmarks/pipeline.py                          # GPUs: the shape of Llama-3-8B on 2 stages
    python benchmarks/pipeline.py --shape small            # on a CPU, a core for each stage

One forward_backward of m equal microbatches through p stages, as its ranks have written it to events.jsonl: a picture
(results/pipeline.png) and the efficiency, the time in which stages compute over p times the time that it all takes. 1F1B can
reach m / (m + p - 1), interleaving with v pieces a stage m v / (m v + p - 1).
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import torch
from _report import RESULTS, Report
from trainer import ADAM, LORA, SHAPES, NoWriter, Shape, make_samples, policy_gradient, write_model

from rlloop.config import MegatronSettings, TrainerSettings
from rlloop.events import Events
from rlloop.tracking import jsonl
from rlloop.trainer.megatron import MegatronTrainer

SMALL = Shape("Qwen2", 2048, 512, 1536, 8, 8, 4, True, 1, 256)
STEPS = 4


async def trace(folder: Path, shape: Shape, layout: MegatronSettings, num_microbatches: int, path: Path) -> None:
    """Several steps, after two to warm up."""
    samples = make_samples(shape, [shape.length] * shape.num_samples * num_microbatches)
    max_tokens = shape.num_samples * shape.length
    events = Events(path)
    settings = TrainerSettings(kind="megatron", max_tokens_per_microbatch=max_tokens, megatron=layout)
    async with MegatronTrainer(
        str(folder),
        dtype="bfloat16" if torch.cuda.is_available() else "float32",
        settings=settings,
        temperature=1.0,
        writer=NoWriter(),
        cores=None if torch.cuda.is_available() else frozenset(range(layout.num_ranks)),
        log_path=folder / "log",
        events=events,
    ) as trainer:
        await trainer.create_adapter("policy", LORA)
        for _ in range(STEPS + 2):
            await trainer.forward_backward("policy", samples, policy_gradient)
            await trainer.optim_step("policy", ADAM)
    events.close()


Span = dict[str, Any]


def last_steps(path: Path) -> list[list[Span]]:
    """The passes of each of the last STEPS steps."""
    passes = [
        e for e in jsonl.read(path) if e["name"] in ("forward", "head", "backward") and e["resource"] != "trainer"
    ]
    passes.sort(key=lambda event: event["start"])
    steps: list[list[Span]] = []
    ends = sorted(e["end"] for e in jsonl.read(path) if e["name"] == "optim_step")
    for begin, end in pairwise(ends):
        steps.append([event for event in passes if begin < event["start"] < end])
    return steps[-STEPS:]


def efficiency(spans: Sequence[Span]) -> tuple[float, float]:
    """-> of one step: efficiency, seconds."""
    busy: defaultdict[str, float] = defaultdict(float)
    for span in spans:
        busy[span["resource"]] += span["end"] - span["start"]
    seconds = max(span["end"] for span in spans) - min(span["start"] for span in spans)
    return sum(busy.values()) / (len(busy) * seconds), seconds


def draw(steps: dict[str, list[Span]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colors = {"forward": "tab:blue", "head": "tab:cyan", "backward": "tab:orange"}
    figure, axes = pyplot.subplots(len(steps), 1, figsize=(12, 2 * len(steps)), squeeze=False)
    for (title, spans), axis in zip(steps.items(), axes[:, 0], strict=True):
        begin = min(span["start"] for span in spans)
        stages = sorted({span["resource"] for span in spans})
        for span in spans:
            start, width = 1e3 * (span["start"] - begin), 1e3 * (span["end"] - span["start"])
            row = stages.index(span["resource"])
            axis.barh(row, width, left=start, color=colors[span["name"]], edgecolor="white", linewidth=0.5)
            if span["name"] != "head":
                axis.text(start + width / 2, row, span["fields"]["microbatch"], ha="center", va="center", fontsize=7)
        axis.set(title=title, yticks=range(len(stages)), yticklabels=stages, xlabel="ms")
        axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8b", choices=[*SHAPES, "small"])
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--microbatches", type=int, default=8)
    arguments = parser.parse_args()
    stages, count = arguments.stages, arguments.microbatches
    shape = {**SHAPES, "small": SMALL}[arguments.shape]
    report = Report("pipeline", ("torch", "megatron-core", "megatron-bridge"))
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        write_model(shape, folder)
        torch.cuda.empty_cache()
        rows, pictures = [], {}
        for pieces in (1, 2):
            layout = MegatronSettings(pipeline_parallel=stages, virtual_stages=pieces)
            path = folder / f"events-{pieces}.jsonl"
            anyio.run(trace, folder, shape, layout, count, path)
            steps = last_steps(path)
            found = [efficiency(step) for step in steps]
            measured = statistics.median(each for each, _ in found)
            bound = count * pieces / (count * pieces + stages - 1)
            name = "1F1B" if pieces == 1 else f"interleaved, {pieces} pieces a stage"
            rows.append(
                {
                    "schedule": name,
                    "stages": stages,
                    "microbatches": count,
                    "ms": 1e3 * statistics.median(seconds for _, seconds in found),
                    "efficiency": measured,
                    "bound": bound,
                    "of the bound": f"{measured / bound:.0%}",
                }
            )
            pictures[f"{name}: {measured:.0%} of the time is computed, bound {bound:.0%}"] = steps[-1]
        report.table(f"{arguments.shape}: microbatches of {shape.num_samples} x {shape.length} tokens", rows)
        RESULTS.mkdir(exist_ok=True)
        draw(pictures, RESULTS / "pipeline.png")
        report.write()
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
