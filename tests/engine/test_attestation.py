"""What the engine says when its ranks do not all hold what the trainer sent."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

from rlloop.engine.replicas import Replicas
from rlloop.engine.tally import Tally
from rlloop.engine.vllm import VllmEngine
from rlloop.errors import EngineError, RefitError
from rlloop.refit.slots import Slots
from rlloop.types import AdapterTicket, Completion, GenerationRequest

pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("ignore")]  # of vLLM


@pytest.fixture
def anyio_backend() -> str:
    """vLLM's."""
    return "asyncio"


TICKET = AdapterTicket((), "float32", "new", "memory", "", num_bytes=7, export_seconds=0.0)
SECONDS = {"transfer_seconds": 0.0, "load_seconds": 0.0, "verify_seconds": 0.0}
RIGHT = {"digest": "new", "different": None, **SECONDS}


class FakeLlm:
    """vLLM with ranks that answer a load as told."""

    def __init__(self) -> None:
        self.ranks: list[dict[str, Any]] = [RIGHT, RIGHT]
        self.calls: list[tuple[str, int]] = []
        self.engine_core = SimpleNamespace(resources=SimpleNamespace(engine_manager=SimpleNamespace(processes=[])))

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        self.calls.append((method, args[0]))
        return self.ranks if method == "refit_load" else [True, True]


@pytest.mark.parametrize(
    ("rank_1", "message"),
    [
        (RIGHT | {"digest": "old"}, "rank 1 holds old, but the trainer sent new .they differ already as they arrived"),
        (RIGHT | {"different": "layers.3.q_proj"}, "rank 1 holds new.* first in layers.3.q_proj"),
        ({"error": "no layer is called qq_proj"}, r"no layer is called qq_proj \(rank 1\)"),
    ],
    ids=["a rank that read what was there before", "a rank whose slot is wrong", "a rank that refuses"],
)
async def test_one_rank_is_enough_to_refuse_a_version(rank_1: dict[str, Any], message: str) -> None:
    llm = FakeLlm()
    engine = VllmEngine(llm, Tally(), 100, Path("engine.log"))
    await engine.publish(4, TICKET)
    llm.ranks = [RIGHT, rank_1]
    with pytest.raises(RefitError, match=f"policy version 5: {message}"):
        await engine.publish(5, TICKET)
    assert llm.calls == [("refit_load", 4), ("refit_load", 5), ("refit_drop", 5)], "rank 0 would have kept it"
    with pytest.raises(EngineError, match=r"version 5 is not loaded; the engine serves \[4\]"):
        await engine.generate(GenerationRequest((1,), 5, max_tokens=1))


@pytest.mark.parametrize("dies", [False, True])
async def test_requests_are_refused_for_the_reason_for_which_the_version_is(dies: bool) -> None:
    """Before it is raised: theirs would end the run in its place, as would an engine that dies of what made it refuse."""
    request = GenerationRequest((1,), 4, max_tokens=1, in_flight="hop")

    class Mixed(FakeLlm):
        async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
            answers = await super().collective_rpc(method, args)
            if (method, args[0]) == ("refit_drop", 5):
                with pytest.raises(RefitError, match="rank 1 holds old"):
                    engine._check(request)
                if dies:
                    raise EngineError("the engine died")
            return answers

    llm = Mixed()
    engine = VllmEngine(llm, Tally(), 100, Path("engine.log"), form="merged")
    swapped = {"swapped_at": 0.0, "num_sampled": {}}
    llm.ranks = [RIGHT | swapped] * 2
    with pytest.raises(EngineError, match="no policy version is loaded"):
        engine._check(request)
    await engine.publish(4, TICKET)
    llm.ranks = [RIGHT | swapped, RIGHT | swapped | {"digest": "old"}]
    with pytest.raises(RefitError, match="rank 1 holds old"):
        await engine.publish(5, TICKET)
    assert llm.calls[-1] == ("refit_drop", 5)
    with pytest.raises(RefitError, match="rank 1 holds old"):
        engine._check(request)
    llm.ranks = [RIGHT | swapped] * 2
    await engine.publish(6, TICKET)
    await engine.retire(6)
    with pytest.raises(EngineError, match="no policy version is loaded"):
        engine._check(request)


async def test_requests_to_replicas_are_refused_for_the_reason_for_which_the_version_is() -> None:
    """The one that holds it in its weights gives it back before the other's refusal is raised."""
    request = GenerationRequest((1,), 4, max_tokens=1, in_flight="hop")
    swapped = {"swapped_at": 0.0, "num_sampled": {}}
    found: list[str] = []

    class Giving(FakeLlm):
        async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
            answers = await super().collective_rpc(method, args)
            if method == "refit_drop" and self.ranks[1]["digest"] == "new":
                with pytest.raises(RefitError) as refused:
                    await replicas.generate(request)
                found.append(str(refused.value))
            return answers

    llms = [Giving(), Giving()]
    for llm in llms:
        llm.ranks = [RIGHT | swapped] * 2
    replicas = Replicas([VllmEngine(llm, Tally(), 100, Path("engine.log"), form="merged") for llm in llms])
    await replicas.publish(4, TICKET)
    llms[1].ranks = [RIGHT | swapped, RIGHT | swapped | {"digest": "old"}]
    with pytest.raises(RefitError, match="rank 1 holds old") as refused:
        await replicas.publish(5, TICKET)
    assert found == [str(refused.value)]
    for llm in llms:
        llm.ranks = [RIGHT | swapped] * 2
    await replicas.publish(6, TICKET)
    assert replicas._refusal is None


async def test_a_version_that_is_refused_because_it_is_there_stays() -> None:
    llm = FakeLlm()
    engine = VllmEngine(llm, Tally(), 100, Path("engine.log"))
    await engine.publish(4, TICKET)
    llm.ranks = [{"error": "loaded already"}] * 2
    with pytest.raises(RefitError, match="loaded already"):
        await engine.publish(4, TICKET)
    assert [method for method, _ in llm.calls] == ["refit_load", "refit_load"]


async def test_a_retire_that_was_cancelled_can_be_made_up_for() -> None:
    llm = FakeLlm()
    engine = VllmEngine(llm, Tally(), 100, Path("engine.log"))
    await engine.publish(4, TICKET)
    with anyio.CancelScope() as scope:
        scope.cancel()
        await engine.retire(4)
    await engine.retire(4)
    assert ("refit_drop", 4) in llm.calls


async def test_stop_strings_and_restarts_exclude_each_other() -> None:
    engine = VllmEngine(FakeLlm(), Tally(), 100, Path("engine.log"))
    await engine.publish(4, TICKET)
    with pytest.raises(EngineError, match="stop strings cannot restart"):
        await engine.generate(GenerationRequest((1,), 4, max_tokens=1, stop=("\n",), in_flight="restart"))


def test_slots_need_no_tensor_parallel_size_of_layers_without_adapters() -> None:
    """Embeddings have none in vLLM 0.26."""
    layers = {"embed": SimpleNamespace(), "down_proj": SimpleNamespace(tp_size=1)}
    assert not Slots(SimpleNamespace(modules=layers, packed_modules={})).are_sharded
    layers["down_proj"].tp_size = 2
    assert Slots(SimpleNamespace(modules=layers, packed_modules={})).are_sharded


async def test_replicas_make_up_for_a_retire_that_was_cancelled() -> None:
    llms = [FakeLlm(), FakeLlm()]
    replicas = Replicas([VllmEngine(llm, Tally(), 100, Path("engine.log")) for llm in llms])
    await replicas.publish(4, TICKET)
    with anyio.CancelScope() as scope:
        scope.cancel()
        await replicas.retire(4)
    await replicas.retire(4)
    assert all(("refit_drop", 4) in llm.calls for llm in llms)


class TurnedLlm:
    """vLLM whose workers answer, and whose request ends, when told."""

    def __init__(self, sentinel: int) -> None:
        self.answer: asyncio.Future[list[Any]] = asyncio.Future()
        self.output: asyncio.Future[Any] = asyncio.Future()
        engine = SimpleNamespace(processes=[SimpleNamespace(sentinel=sentinel)])
        self.engine_core = SimpleNamespace(resources=SimpleNamespace(engine_manager=engine))

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        return await self.answer

    async def generate(self, prompt: Any, params: Any, request_id: str, lora_request: Any) -> AsyncIterator[Any]:
        yield await self.output


async def test_two_calls_to_the_workers_take_turns() -> None:
    """Both would watch for the death of the same process, which asyncio lets one task do."""
    reading, writing = os.pipe()
    llm = TurnedLlm(reading)
    engine = VllmEngine(llm, Tally(), 100, Path("engine.log"))
    async with anyio.create_task_group() as tasks:
        for version in (1, 2):
            tasks.start_soon(engine.retire, version)
        await anyio.wait_all_tasks_blocked()
        llm.answer.set_result([True])
    os.close(reading)
    os.close(writing)


@pytest.mark.real
async def test_a_request_that_ends_in_the_turn_in_which_a_swap_is_told_has_lived_through_it() -> None:
    reading, writing = os.pipe()
    llm = TurnedLlm(reading)
    engine = VllmEngine(llm, Tally(), 100, Path("engine.log"), serves_hops=True)
    llm.answer.set_result([RIGHT | {"swapped_at": 1.0, "num_sampled": {}}])
    await engine.publish(0, TICKET)
    llm.answer = asyncio.Future()
    found: list[Completion] = []

    async def ask() -> None:
        found.extend(await engine.generate(GenerationRequest((1,), 0, max_tokens=5, in_flight="hop")))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask)
        await anyio.wait_all_tasks_blocked()
        tasks.start_soon(engine.publish, 1, TICKET)
        await anyio.wait_all_tasks_blocked()
        llm.answer.set_result([RIGHT | {"swapped_at": 3.0, "num_sampled": {"0": 3}}])
        logprobs = SimpleNamespace(logprobs=[-1.0] * 5)
        whole = SimpleNamespace(token_ids=[4, 5, 6, 7, 8], logprobs=logprobs, finish_reason="length")
        llm.output.set_result(SimpleNamespace(outputs=[whole], metrics=SimpleNamespace(first_token_ts=2.0)))
    os.close(reading)
    os.close(writing)
    assert found[0].versions.tolist() == [0, 0, 0, 1, 1]


@pytest.mark.real
async def test_a_request_that_would_go_on_is_refused_for_the_reason_for_which_the_version_is() -> None:
    reading, writing = os.pipe()
    llm = TurnedLlm(reading)
    engine = VllmEngine(llm, Tally(), 100, Path("engine.log"), form="merged")
    swapped = {"swapped_at": 1.0, "num_sampled": {}}
    llm.answer.set_result([RIGHT | swapped])
    await engine.publish(0, TICKET)

    async def ask() -> None:
        with pytest.raises(RefitError, match="rank 0 holds old"):
            await engine.generate(GenerationRequest((1,), 0, max_tokens=5, in_flight="restart"))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask)
        await anyio.wait_all_tasks_blocked()
        llm.answer = asyncio.Future()
        llm.answer.set_result([RIGHT | swapped | {"digest": "old"}])
        with pytest.raises(RefitError, match="rank 0 holds old"):
            await engine.publish(1, TICKET)
        cut = SimpleNamespace(token_ids=[4], logprobs=SimpleNamespace(logprobs=[-1.0]), finish_reason="abort")
        llm.output.set_result(SimpleNamespace(outputs=[cut], metrics=SimpleNamespace(first_token_ts=2.0)))
    os.close(reading)
    os.close(writing)
