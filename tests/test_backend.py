"""Runs that follow each other on the engine and the trainer of one backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import pytest
from rlloop.algorithms import grpo, ppo

from rlloop.backend import Backend
from rlloop.config import RunSettings
from rlloop.engine.fake import FakeEngine
from rlloop.errors import ConfigError, TrainerError
from rlloop.tracking.files import read_metrics
from rlloop.trainer import Loss
from rlloop.trainer.fake import FakeTrainer
from rlloop.types import LoraConfig, Metrics, Sample

TOKENS = """
from rlloop.environment import Trajectory

class Tokens:
    def __len__(self):
        return 5

    def task(self, index):
        return index

    async def rollout(self, task, policy):
        trajectory = Trajectory()
        trajectory.observe([task, 2, 3])
        trajectory.act(await policy.generate(trajectory.tokens))
        return trajectory.finish("", "stop")

    def score(self, task, rollout):
        return float(rollout.tokens[-1] % 7)
"""


class Tokenizer:
    def decode(self, tokens: Any) -> str:
        return ""


class Trainer(FakeTrainer):
    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, int]] = []

    async def create_adapter(self, name: str, lora: LoraConfig, head: Any = "policy") -> None:
        if name in self.steps:
            raise TrainerError(f"adapter {name!r} exists already")
        self.made.append((name, lora.seed))
        await super().create_adapter(name, lora, head)

    async def forward_backward(self, name: str, samples: Any, loss: Loss) -> Metrics:
        if len(self.made) == 4 and self.steps[name] == 1:
            raise TrainerError("made up")
        return await super().forward_backward(name, samples, loss)

    async def logprobs(self, name: str | None, samples: list[Sample]) -> list[Any]:  # type: ignore[override]
        return [sample.rollout_logprobs for sample in samples]


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "tests_env_tokens.py").write_text(TOKENS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "tests_env_tokens:Tokens"


def test_nothing_of_a_run_is_left_for_the_next(environment: str, tmp_path: Path) -> None:
    common: dict[str, Any] = {"env": environment, "groups_per_step": 2, "group_size": 2, "num_steps": 3}
    engine, trainer = FakeEngine(), Trainer()
    backend = Backend(RunSettings(), engine, trainer, Tokenizer())

    async def runs() -> None:
        await grpo.train(grpo.Config(run_dir=tmp_path / "a", seed=1, **common), "marker", backend)
        assert (engine.versions, trainer.steps) == (set(), {})
        await ppo.train(ppo.Config(run_dir=tmp_path / "b", num_minibatches=1, **common), "marker", backend)
        assert (engine.versions, trainer.steps) == (set(), {})
        with pytest.raises(ExceptionGroup) as failed:  # a run that fails leaves as little
            await grpo.train(grpo.Config(run_dir=tmp_path / "c", **common), "marker", backend)
        assert failed.group_contains(TrainerError, match="made up")
        assert (engine.versions, trainer.steps) == (set(), {})
        await grpo.train(grpo.Config(run_dir=tmp_path / "d", **common), "marker", backend)

    anyio.run(runs)
    assert trainer.made == [("policy", 1), ("policy", 0), ("critic", 0), ("policy", 0), ("policy", 0)]
    for name in "abd":
        assert [line["step"] for line in read_metrics(tmp_path / name)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "gpt2"}, "model gpt2"),
        ({"sampling": {"temperature": 0.5}}, "sampling.temperature 0.5"),
        ({"lora": {"rank": 32}}, "lora.rank 32"),
        ({"max_staleness": 3}, "room for 14 policy versions"),
        ({"engine": {"max_num_seqs": 32}}, "engine .*max_num_seqs=32"),
    ],
)
def test_a_run_that_needs_another_backend_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    backend = Backend(RunSettings(), FakeEngine(), FakeTrainer(), Tokenizer())
    config = grpo.Config(run_dir=tmp_path / "run", **settings)
    with pytest.raises(ConfigError, match=f"does not fit the backend.*{message}"):
        anyio.run(grpo.train, config, "marker", backend)
    assert not (tmp_path / "run").exists()


def test_a_run_may_need_less(tmp_path: Path) -> None:
    backend = Backend(RunSettings(lora={"rank": 32}, max_staleness=4), FakeEngine(), FakeTrainer(), Tokenizer())  # type: ignore[arg-type]
    backend.check(grpo.Config(lora={"rank": 8}, max_staleness=0, seed=3, group_size=2))
