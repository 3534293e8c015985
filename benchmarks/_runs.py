"""What several benchmarks need: a run of `rlloop` as a process, its figures, and a model that never stops by itself."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rlloop.models import resolve_model
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
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    begin = min(event["start"] for event in events if event["name"] == "rollout")
    end = max(event["end"] for event in events if event["name"] == "refit")
    rows = sum(len(path.read_text().splitlines()) for path in (run_dir / "completions").iterdir())
    return Figures(read_metrics(run_dir), end - begin, rows)


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
