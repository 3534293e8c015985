"""Two algorithms in turn on one real engine and trainer, the second of them warm-started from the first one's adapter, which only
some layers have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rlloop.tracking.files import read_metrics

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

ENVIRONMENT = """
from rlloop.envs.arithmetic import Arithmetic

class Lengths(Arithmetic):
    def score(self, task, rollout):
        return len(rollout.text) % 7 / 6
"""
PROGRAM = """
import sys
from pathlib import Path
from rlloop.algorithms import grpo, ppo
from rlloop.backend import open_backend
from rlloop.run import run

folder, model = map(Path, sys.argv[1:])
common = dict(
    model=str(model), dtype="float32", env="lengths:Lengths", groups_per_step=2, group_size=4, max_staleness=1,
    engine={"max_model_len": 128, "max_num_seqs": 32}, sampling={"max_tokens": 8}, optim={"lr": 1e-2},
    trainer={"kind": "megatron"},
    lora={"targets": ("q_proj", "down_proj")},  # one of three in a layer of vLLM's, all of another, none of the others
)
first = ppo.Config(run_dir=folder / "first", num_steps=3, kl_coef=0.1, num_minibatches=2, **common)
second = grpo.Config(
    run_dir=folder / "second", num_steps=3, advantage="raw", kl_coef=0.1, init_adapter=folder / "first/latest/adapter", **common
)

async def main(settings, marker):
    async with open_backend(settings, marker, folder / "backend") as backend:
        await ppo.train(first, marker, backend)
        await grpo.train(second, marker, backend)

run(main, first)
"""


def test_runs_in_turn(tiny_llama: Path, tmp_path: Path) -> None:
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"
    }  # lengths.py is found here
    (tmp_path / "lengths.py").write_text(ENVIRONMENT)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(tiny_llama)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    for name in ("first", "second"):
        lines = read_metrics(tmp_path / name)
        assert [line["step"] for line in lines] == [1, 2, 3]
        # In float32 the engine samples from what the trainer holds: of this run's policy, and of no other.
        fresh = [line for line in lines if line["async/staleness_max"] == 0]
        assert fresh
        assert [line["policy/sampler_kl_max"] for line in fresh] == pytest.approx([0] * len(fresh), abs=1e-6)
        assert all(line["optim/grad_norm"] > 0 for line in lines)
    assert read_metrics(tmp_path / "second")[0]["policy/kl_ref"] > 1e-4  # of a new adapter, which is the base, it is 0
    final = load_file(tmp_path / "first" / "latest" / "adapter" / "adapter_model.safetensors")
    assert any(tensor.abs().max() > 0 for key, tensor in final.items() if "lora_B" in key)
    assert {path.name for path in (tmp_path / "backend").iterdir()} == {"logs", "events.jsonl"}
