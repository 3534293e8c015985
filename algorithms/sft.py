"""Supervised fine-tuning: a warm start for a policy that RL alone would not move.

    rlloop sft --dataset answers.jsonl --run-dir runs/sft
    rlloop grpo --init-adapter runs/sft/latest/adapter --env dataset ...

RL learns from answers that are sometimes right; a small model may never give one, or not in the form that a reward reads. This
shows it such answers first: the loss is the mean negative log-likelihood of their tokens. No engine is started: the trainer has
the machine to itself. `rlloop.supervised` says which datasets are read (TRL's conventions).

Deviations from TRL's SFTTrainer:
* A chat is trained as the policy will sample it: the loss is on assistant turns only, each to the token that ends it.
* Rows longer than `--max-length` are left out and counted, never cut: half an answer teaches not to stop.
* Batches run on from one epoch into the next, each row once per epoch; the learning rate is constant; the base is frozen (LoRA).

Expected: `loss/policy` falls within the first steps. On `examples/sft/questions.jsonl` a random Llama of two layers goes from
12.1 to about 7.5 nats a token in 30 steps at `--optim.lr 1e-2` (tests/algorithms/test_sft.py).
"""

from __future__ import annotations

from functools import partial

from rlloop.adapters import POLICY
from rlloop.cli import entry_point
from rlloop.supervised_run import SupervisedSettings, open_supervised_run
from rlloop.trainer import Trainer
from rlloop.types import Metrics, Sample
from rlloop.updates import optimizer_step


class Config(SupervisedSettings):
    """Supervised fine-tuning: a warm start for a policy that RL alone would not move."""


async def update(trainer: Trainer, samples: list[Sample], config: Config) -> Metrics:
    """One optimizer step on one batch."""
    from rlloop.losses import negative_log_likelihood  # torch, which `rlloop --help` need not wait for

    return await optimizer_step(trainer, POLICY, samples, negative_log_likelihood, config.optim.adam)


async def train(config: Config, marker: str) -> None:
    """Train under a running event loop; `marker` is that of `rlloop.processes.guard`."""
    async with open_supervised_run(config, marker) as sft:
        await sft.train(partial(update, config=config))


main = entry_point("sft", train)

if __name__ == "__main__":
    main()
