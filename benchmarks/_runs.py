"""What several benchmarks need: a run of `rlloop` as a process, its figures, and a model that never stops by itself."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rlloop.backend import open_backend
from rlloop.config import RunSettings
from rlloop.flags import parse
from rlloop.models import resolve_model
from rlloop.run import run
from rlloop.tracking import jsonl
from rlloop.tracking.files import read_metrics

HERE = Path(__file__).parent
QUICKSTART = HERE.parent / "examples" / "quickstart.toml"


@dataclass
class Figures:
    """One run, from its own files."""

    metrics: list[dict[str, Any]]
    seconds: float
    """From the first rollout's start to the last refit's end: filling the pipeline counts, starting the engine does not."""
    samples: int
    evaluations: list[dict[str, Any]]
    """Of held-out prompts."""

    @property
    def samples_per_second(self) -> float:
        """Trained samples, over the whole run."""
        return self.samples / self.seconds

    @property
    def median_step(self) -> float:
        """Seconds of the median step after the first two."""
        return median(line["time/step"] for line in self.metrics[2:])

    @property
    def rewards(self) -> list[float]:
        """Mean reward of each step."""
        return [line["reward/mean"] for line in self.metrics]

    @property
    def first_and_last_five(self) -> tuple[float, float]:
        """Mean reward of the first and of the last five steps."""
        return sum(self.rewards[:5]) / 5, sum(self.rewards[-5:]) / 5

    def mean(self, key: str) -> float:
        """Over the steps after the first two."""
        values = [line[key] for line in self.metrics[2:]]
        return sum(values) / len(values)


def run_rlloop(algorithm: str, run_dir: Path, *flags: str) -> Figures:
    """Run it to its end; raises CalledProcessError if it fails. An environment of this folder can be named."""
    shutil.rmtree(run_dir, ignore_errors=True)
    command = [sys.executable, "-m", "rlloop.cli", algorithm, "--run_dir", str(run_dir), *flags]
    subprocess.run(command, check=True, cwd=HERE, stdout=sys.stderr)
    return read_figures(run_dir)


@dataclass(frozen=True)
class Job:
    """One run to make."""

    algorithm: str
    flags: tuple[str, ...]


def train_in_turn(jobs: Sequence[Job], done: Callable[[Job, Figures], None]) -> None:
    """Run them one after another on the same engine and trainer, whose start takes longer than a short run.

    `done` gets each as it ends. They must agree on model, engine and trainer. Tables go to stderr.
    """
    modules = [importlib.import_module(f"rlloop.algorithms.{job.algorithm}") for job in jobs]
    with tempfile.TemporaryDirectory() as scratch, redirect_stdout(sys.stderr):
        run_dir = Path(scratch) / "run"
        common = ["--run_dir", str(run_dir), "--overwrite"]
        configs = [
            parse(module.Config, [*job.flags, *common], job.algorithm)[0]
            for job, module in zip(jobs, modules, strict=True)
        ]

        async def train(widest: RunSettings, marker: str) -> None:
            async with open_backend(widest, marker, Path(scratch) / "backend") as backend:
                for job, module, config in zip(jobs, modules, configs, strict=True):
                    await module.train(config, marker, backend)
                    done(job, read_figures(run_dir))

        run(train, max(configs, key=lambda config: config.num_versions))


Run = dict[str, Any]


def keep_runs(
    path: Path, wanted: Sequence[tuple[Run, Job]], record: Callable[[Figures], Run], facts: Mapping[str, str]
) -> list[Run]:
    """All runs that the file has, a line each; those wanted that it lacks are made and added as they end.

    All must have the same `num_steps` and `flags`. What a run is kept with: what it is wanted as, what `record` says of it, and
    the facts of the report.
    """
    path.parent.mkdir(exist_ok=True)
    runs: list[Run] = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    settings = {json.dumps([run["num_steps"], run["flags"]]) for run in [*runs, *(what for what, _ in wanted)]}
    if len(settings) > 1:
        sys.exit(f"{path}: one table of runs with other steps and flags: {' and '.join(settings)}; give another --name")
    missing = {job: what for what, job in wanted if not any(what.items() <= run.items() for run in runs)}

    def done(job: Job, figures: Figures) -> None:
        run = {**missing[job], **record(figures), **facts}
        with path.open("a") as file:
            file.write(json.dumps(run) + "\n")
        runs.append(run)
        last = fmean(figures.rewards[-5:])
        print(f"{missing[job]}: {last:.3f} at {figures.median_step:.2f} s/step", file=sys.stderr, flush=True)

    if missing:
        train_in_turn(list(missing), done)
    return runs


def read_figures(run_dir: Path) -> Figures:
    """Of a run that has ended."""
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    begin = min(event["start"] for event in events if event["name"] == "rollout")
    end = max(event["end"] for event in events if event["name"] == "refit")
    rows = sum(len(path.read_text().splitlines()) for path in (run_dir / "completions").iterdir())
    evaluations = list(jsonl.read(path)) if (path := run_dir / "evaluations.jsonl").exists() else []
    return Figures(read_metrics(run_dir), end - begin, rows, evaluations)


def endless_model(name: str, folder: Path) -> Path:
    """The model (SmolLM2) with an end-of-sequence token that it never samples: every completion has `max_tokens` tokens."""
    shutil.copytree(resolve_model(name), folder, dirs_exist_ok=True)
    unused = "<gh_stars>"  # a special token of its pre-training data
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": unused}))
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    token_id = next(token["id"] for token in vocabulary["added_tokens"] if token["content"] == unused)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**settings, "eos_token_id": token_id}))
    return folder
