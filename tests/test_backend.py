"""Runs that follow each other on the engine and the trainer of one backend."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from rlloop.algorithms import grpo, ppo

from rlloop.backend import Backend, load_tokenizer, open_backend
from rlloop.config import RunSettings
from rlloop.engine.fake import FakeEngine
from rlloop.engine.replicas import Replicas
from rlloop.errors import ConfigError, TrainerError
from rlloop.placement import Placement
from rlloop.tracking import jsonl
from rlloop.tracking.files import read_metrics
from rlloop.trainer import Loss
from rlloop.trainer.fake import FakeTrainer
from rlloop.types import AdapterTicket, LoraConfig, Metrics, RefitReport, Sample

TOKENS = """
from rlloop.environment import Trajectory

class Tokens:
    def __init__(self, num_solved=0):
        self.num_solved = num_solved

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
        return 1.0 if task < self.num_solved else (1 + rollout.tokens[-1] % 7) / 9
"""


class Tokenizer:
    def decode(self, tokens: Any) -> str:
        return " ".join(map(str, tokens))

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


class Trainer(FakeTrainer):
    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, int]] = []
        self.loaded: list[tuple[str, Path, bool]] = []
        """Name, where its weights are, and whether its optimizer's state is there, too."""
        self.fits = True

    async def create_adapter(self, name: str, lora: LoraConfig, head: Any = "policy") -> None:
        if name in self.steps:
            raise TrainerError(f"adapter {name!r} exists already")
        self.made.append((name, lora.seed))
        await super().create_adapter(name, lora, head)

    async def load(self, name: str, folder: Path) -> None:
        self.loaded.append((name, (folder / "adapter").resolve(), (folder / "state").exists()))
        if not self.fits:
            raise TrainerError("the adapter saved there does not fit")

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


def test_a_run_begins_with_the_weights_of_an_adapter(environment: str, tmp_path: Path) -> None:
    """Which may not fit: then, too, nothing is left for the next run."""
    adapter = tmp_path / "sft" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 16, "lora_alpha": 32}))
    (adapter / "adapter_model.safetensors").touch()
    engine, trainer = FakeEngine(), Trainer()
    backend = Backend(RunSettings(), engine, trainer, Tokenizer())
    config = ppo.Config(
        env=environment, num_steps=1, groups_per_step=2, num_minibatches=1, run_dir=tmp_path / "a", init_adapter=adapter
    )

    async def runs() -> None:
        trainer.fits = False
        with pytest.raises(TrainerError, match="does not fit"):
            await ppo.train(config, "marker", backend)
        assert (engine.versions, trainer.steps) == (set(), {})
        trainer.fits = True
        await ppo.train(config.model_copy(update={"run_dir": tmp_path / "b"}), "marker", backend)

    anyio.run(runs)
    assert trainer.loaded == [("policy", adapter, False)] * 2


def test_what_is_solved_is_passed_over_from_the_second_epoch_on(environment: str, tmp_path: Path) -> None:
    backend = Backend(RunSettings(), FakeEngine(), FakeTrainer(), Tokenizer())
    config = grpo.Config(
        env=environment,
        env_args={"num_solved": 3},
        curriculum={"keep": 0.01},
        groups_per_step=2,
        group_size=4,
        num_steps=8,
        max_staleness=0,
        run_dir=tmp_path / "run",
    )
    anyio.run(grpo.train, config, "marker", backend)
    rows = [row for path in (tmp_path / "run" / "completions").iterdir() for row in jsonl.read(path)]
    asked = {row["ordinal"]: int(row["prompt"].split()[0]) for row in rows}
    assert sorted(task for ordinal, task in asked.items() if ordinal < 5) == [0, 1, 2, 3, 4]
    assert {task for ordinal, task in asked.items() if ordinal >= 5} == {3, 4}
    assert len(asked) == 16
    last = read_metrics(tmp_path / "run")[-1]
    assert last["progress/passed_over"] == max(asked) + 1 - 16


class SlowToPublish(FakeEngine):
    async def publish(self, version: int, ticket: AdapterTicket) -> RefitReport:
        report = await super().publish(version, ticket)
        if version == 1:
            cancel.set()
            await anyio.sleep(0.05)  # the worker has it; the answer is on its way
        return report


cancel = anyio.Event()


def test_a_version_whose_publish_was_cancelled_is_retired(environment: str, tmp_path: Path) -> None:
    engine = SlowToPublish()
    backend = Backend(RunSettings(), engine, FakeTrainer(), Tokenizer())
    config = grpo.Config(env=environment, num_steps=5, groups_per_step=2, group_size=2, run_dir=tmp_path / "run")

    async def stopped() -> None:
        async with anyio.create_task_group() as tasks:

            async def train() -> None:
                await grpo.train(config, "marker", backend)

            tasks.start_soon(train)
            await cancel.wait()
            tasks.cancel_scope.cancel()

    anyio.run(stopped)
    assert engine.versions == set()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "gpt2"}, "model gpt2"),
        ({"sampling": {"temperature": 0.5}}, "sampling.temperature 0.5"),
        ({"lora": {"rank": 32}}, "lora.rank 32"),
        ({"lora": {"targets": "q_proj,lm_head"}}, "wants lora.targets lm_head;"),
        ({"max_staleness": 3}, "room for 14 policy versions"),
        ({"chat_template_kwargs": {"mood": "calm"}}, "chat_template_kwargs .*calm"),
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


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match=r"^--model: expected a model with its tokenizer.s files, got "):
        load_tokenizer(str(tmp_path), {})


def test_a_chat_template_gets_its_variables_whoever_renders_it(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_llama), {"mood": "calm"})
    tokenizer.chat_template = "{{ mood }} {{ messages[0]['content'] }}"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "calm Hi"


@pytest.mark.parametrize("replicas", [1, 2])
def test_each_engine_gets_gpus_of_its_own(replicas: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []
    all_begun, last_ready, all_end = anyio.Event(), anyio.Event(), anyio.Event()
    ending: list[str] = []
    engines = {name: FakeEngine() for name in ("engine.log", "engine-0.log", "engine-1.log")}

    @asynccontextmanager
    async def start(model: str, settings: Any, **arguments: Any) -> AsyncIterator[FakeEngine]:
        started.append(arguments | {"settings": settings})
        if len(started) == replicas:
            all_begun.set()
        with anyio.fail_after(5):
            await all_begun.wait()  # in vain, where one starts after the other
            if arguments["log_path"].name == "engine-0.log":
                await last_ready.wait()
        last_ready.set()
        yield engines[arguments["log_path"].name]
        ending.append(arguments["log_path"].name)
        if len(ending) == replicas:
            all_end.set()
        with anyio.fail_after(5):
            await all_end.wait()  # likewise

    @asynccontextmanager
    async def trainer(model: str, **arguments: Any) -> AsyncIterator[FakeTrainer]:
        assert arguments["visible_gpus"] == "c,d"
        yield FakeTrainer()

    monkeypatch.setattr("rlloop.placement.visible_gpus", lambda: list("abcd"))
    monkeypatch.setattr("rlloop.backend.load_tokenizer", lambda model, chat_template_kwargs: None)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    monkeypatch.setattr("rlloop.engine.vllm.start_vllm", start)
    monkeypatch.setattr("rlloop.trainer.kinds.trainer_class", lambda kind: trainer)
    placement = Placement("bfloat16", None, None, replicas, 2 // replicas, (0, 1), (2, 3), kv_cache_gib=7)

    async def run() -> None:
        settings = RunSettings(model=str(tmp_path), groups_per_step=8, group_size=5, max_staleness=1)
        async with open_backend(settings, "marker", tmp_path, placement=placement) as backend:
            if replicas == 1:
                assert backend.engine is engines["engine.log"]
            else:
                assert isinstance(backend.engine, Replicas)
                assert backend.engine.engines == [engines["engine-0.log"], engines["engine-1.log"]]

    anyio.run(run)
    assert len(ending) == replicas
    # 8 x 5 x 2 rollouts are in flight at most.
    assert {(each["settings"].max_num_seqs, each["settings"].kv_cache_gib) for each in started} == {(80, 7)}
    found = [(each["gpus"], each["tensor_parallel"], each["log_path"].name, each["cores"]) for each in started]
    if replicas == 1:
        assert found == [((0, 1), 2, "engine.log", None)]
    else:
        assert found == [((0,), 1, "engine-0.log", None), ((1,), 1, "engine-1.log", None)]
