"""vLLM itself, on a tiny model in float32: one engine for all tests of this file."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import anyio
import numpy as np
import psutil
import pytest
import torch
from vllm_harness import NUM_VERSIONS, PROMPT, Harness, open_harness, sample_across_a_publish

from rlloop.errors import EngineError, RefitError
from rlloop.refit.transports import make_writer
from rlloop.types import AdapterTicket, GenerationRequest, Transport

pytestmark = [pytest.mark.real, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def shared(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    core = frozenset({min(os.sched_getaffinity(0))})
    with open_harness(tiny_llama, tmp_path_factory.mktemp("engine"), cores=core, serves_hops=True) as harness:
        yield harness


@pytest.fixture
def harness(shared: Harness) -> Iterator[Harness]:
    """With no version loaded."""
    yield shared
    shared.retire_all()


@pytest.mark.parametrize("transport", ["memory", "broadcast", "disk"])
def test_a_version_samples_with_its_own_weights(harness: Harness, transport: Transport) -> None:
    old, old_weights = harness.publish(transport)
    new, new_weights = harness.publish(transport)
    # The same prompt on both, so that a prefix cache shared between them would show.
    for version, weights, other in ((old, old_weights, new_weights), (new, new_weights, old_weights)):
        [completion] = harness.generate(version)
        assert completion.policy_version == version
        harness.assert_sampled_by(weights, [completion])
        difference = harness.reference.logprobs(other, PROMPT, completion) - completion.logprobs
        assert np.abs(difference).max() > 0.05, "the versions are too alike for this test to fail"


def test_a_number_that_is_published_again_shares_nothing_with_the_first(harness: Harness) -> None:
    """A later run on the same engine counts from 0, too: no block of the prefix cache may be the first one's."""
    version, weights = harness.publish()
    harness.assert_sampled_by(weights, harness.generate(version))
    harness.do(lambda: harness.engine.retire(version))
    other = harness.reference.random_weights(1000 + version)
    harness.do(lambda: harness.engine.publish(version, harness.write(other)))
    [completion] = harness.generate(version)
    harness.assert_sampled_by(other, [completion])
    difference = harness.reference.logprobs(weights, PROMPT, completion) - completion.logprobs
    assert np.abs(difference).max() > 0.05, "the versions are too alike for this test to fail"


def test_adapters_on_other_modules_take_turns(harness: Harness) -> None:
    """Where tensors belong is worked out when it changes: nothing of one arrangement is left in the next."""
    for wanted in ("", "q_proj", "", "down_proj"):
        version, weights = harness.new_version()
        sent = {name: tensor for name, tensor in weights.items() if wanted in name}
        harness.publish_as(version, sent)
        others = {name: tensor if name in sent else torch.zeros_like(tensor) for name, tensor in weights.items()}
        harness.assert_sampled_by(others, harness.generate(version))
        harness.do(lambda version=version: harness.engine.retire(version))  # type: ignore[misc]


def test_a_report_says_what_a_publish_cost(harness: Harness) -> None:
    version, weights = harness.new_version()
    ticket = harness.write(weights)
    report = harness.do(lambda: harness.engine.publish(version, ticket))
    assert report.policy_version == version
    assert report.num_bytes == ticket.num_bytes == sum(tensor.numel() * 4 for tensor in weights.values())
    parts = (report.export_seconds, report.transfer_seconds, report.load_seconds, report.verify_seconds)
    assert min(parts) > 0
    assert sum(parts) <= report.publish_seconds
    harness.generate(version)
    assert harness.engine.statistics().first_token_seconds[version] > 0


def test_requests_in_flight_across_a_publish_keep_their_version(harness: Harness) -> None:
    (old, old_weights), _, found = sample_across_a_publish(harness, "finish", num=4)
    harness.assert_sampled_by(old_weights, found)
    assert {completion.policy_version for completion in found} == {old}
    assert [completion.token_versions for completion in found] == [None] * 4
    # How long it is, benchmarks/refit.py says: on a busy machine any bound is wrong.
    assert harness.engine.statistics().longest_gap_seconds > 0


def test_requests_that_restart_are_prefilled_by_the_new_version(harness: Harness) -> None:
    (old, old_weights), (new, new_weights), found = sample_across_a_publish(harness, "restart", num=3)
    for completion in found:
        versions = completion.token_versions
        assert versions is not None
        assert (completion.policy_version, len(versions)) == (old, len(completion.tokens))
        cut = int((versions == old).sum())
        assert versions.tolist() == [old] * cut + [new] * (len(versions) - cut)
        assert 0 < cut < len(versions)
        assert len(versions) == 400
        own = harness.reference.logprobs(old_weights, PROMPT, completion)
        np.testing.assert_allclose(own[:cut], completion.logprobs[:cut], atol=1e-4)
        own = harness.reference.logprobs(new_weights, PROMPT, completion)
        np.testing.assert_allclose(own[cut:], completion.logprobs[cut:], atol=1e-4)


def test_requests_that_hop_go_on_over_the_old_keys_and_values(harness: Harness) -> None:
    (old, old_weights), (new, new_weights), found = sample_across_a_publish(harness, "hop", num=3)
    for completion in found:
        versions = completion.token_versions
        assert versions is not None
        cut = int((versions == old).sum())
        assert versions.tolist() == [old] * cut + [new] * (len(versions) - cut)
        assert 0 < cut < len(versions)
        own = harness.reference.logprobs_of_a_hop([old_weights, new_weights], [0, cut], PROMPT, completion)
        np.testing.assert_allclose(own, completion.logprobs, atol=1e-4)
        off_by_one = harness.reference.logprobs_of_a_hop([old_weights, new_weights], [0, cut + 1], PROMPT, completion)
        assert np.abs(off_by_one - completion.logprobs).max() > 0.01, "the versions are too alike for this test to fail"


def test_a_request_that_is_done_before_a_publish_has_one_version(harness: Harness) -> None:
    version, weights = harness.publish()
    for in_flight in ("restart", "hop"):
        [completion] = harness.generate(version, in_flight=in_flight)
        harness.assert_sampled_by(weights, [completion])
        assert (completion.policy_version, completion.token_versions) == (version, None)
        # A version that was retired since: what is sampled is the newest all the same.
        [completion] = harness.generate(version - 1, in_flight=in_flight)
        assert completion.policy_version == version
        for wrong in ({"n": 2}, {"policy_version": version + 1}):
            with pytest.raises(EngineError, match=f"up to the newest, {version}"):
                harness.generate(version, in_flight=in_flight, **wrong)


def test_n_and_seeds(harness: Harness) -> None:
    version, weights = harness.publish()
    several = harness.generate(version, n=4)
    assert len({tuple(completion.tokens.tolist()) for completion in several}) == 4
    harness.assert_sampled_by(weights, several)
    [first], [again], [other] = (harness.generate(version, seed=seed) for seed in (11, 11, 12))
    assert first.tokens.tolist() == again.tokens.tolist()
    assert first.tokens.tolist() != other.tokens.tolist()
    assert first.tokens.dtype == np.int32
    assert first.logprobs.dtype == np.float32
    assert first.finish_reason == "length"
    assert len(first.tokens) == len(first.logprobs) == 16


def test_a_stop_string_ends_a_request(harness: Harness, tiny_llama: Path) -> None:
    """Which vLLM's front end sees, and not the process that holds logprobs back."""
    from transformers import AutoTokenizer

    version, weights = harness.publish()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    [whole] = harness.generate(version, max_tokens=200)
    words = [tokenizer.decode([token]) for token in whole.tokens.tolist()]
    place = next(place for place, word in enumerate(words) if place > 20 and len(word) > 3 and word.isascii())
    [stopped] = harness.generate(version, max_tokens=200, stop=(words[place],))
    assert stopped.finish_reason == "stop"
    assert 0 < len(stopped.tokens) <= place + 1
    assert stopped.tokens.tolist() == whole.tokens[: len(stopped.tokens)].tolist()
    harness.assert_sampled_by(weights, [stopped])


def test_logprobs_are_those_of_the_distribution_at_the_temperature(harness: Harness) -> None:
    version, weights = harness.publish()
    [completion] = harness.generate(version, temperature=0.5)
    at_one = harness.reference.logprobs(weights, PROMPT, completion)
    assert completion.logprobs.mean() > at_one.mean()
    [greedy] = harness.generate(version, temperature=0.05)
    assert np.exp(greedy.logprobs).mean() > 0.5


@pytest.mark.parametrize("max_tokens", [1, 16])
def test_a_version_that_is_not_served_is_refused(harness: Harness, max_tokens: int) -> None:
    version, _ = harness.publish()
    for unknown in (version + 1000, -1):
        with pytest.raises(EngineError, match=rf"policy version {unknown} is not loaded.*{version}"):
            harness.generate(unknown, max_tokens=max_tokens)
    harness.do(lambda: harness.engine.retire(version))
    with pytest.raises(EngineError, match=f"policy version {version} is not loaded"):
        harness.generate(version)


def test_what_does_not_fit_is_refused(harness: Harness) -> None:
    version, _ = harness.publish()
    with pytest.raises(EngineError, match=r"--engine.max-model-len \(512\)"):
        harness.generate(version, max_tokens=480)


def refuse(harness: Harness, ticket: AdapterTicket, *parts: str) -> None:
    """Publishing raises an error that says these things, the version is not served, and its slot stays free."""
    good, weights = harness.publish()
    bad = 900 + good
    with pytest.raises(RefitError) as caught:
        harness.do(lambda: harness.engine.publish(bad, ticket))
    assert [part for part in (str(bad), *parts) if part not in str(caught.value)] == [], caught.value
    with pytest.raises(EngineError, match="not loaded"):
        harness.generate(bad)
    harness.assert_sampled_by(weights, harness.generate(good))
    _, right = harness.new_version()
    for version in range(bad, bad + NUM_VERSIONS - 1):  # into every other slot
        harness.do(lambda version=version: harness.engine.publish(version, harness.write(right)))  # type: ignore[misc]
    harness.assert_sampled_by(right, harness.generate(bad))
    with pytest.raises(RefitError, match=f"all {NUM_VERSIONS} adapter slots hold"):
        harness.do(lambda: harness.engine.publish(bad + NUM_VERSIONS, harness.write(right)))
    for version in list(harness.engine._versions):
        harness.do(lambda version=version: harness.engine.retire(version))  # type: ignore[misc]


def test_a_tensor_that_no_layer_would_use_is_refused(harness: Harness) -> None:
    _, weights = harness.new_version()
    renamed = {
        name.replace("layers.1.self_attn.q_proj", "layers.1.self_attn.qq_proj"): w for name, w in weights.items()
    }
    refuse(harness, harness.write(renamed), "qq_proj")


def test_a_layer_that_the_model_lacks_is_refused(harness: Harness) -> None:
    _, weights = harness.new_version()
    renamed = {name.replace("layers.1.", "layers.7."): tensor for name, tensor in weights.items()}
    refuse(harness, harness.write(renamed), "layers.7")


def test_an_a_without_its_b_is_refused(harness: Harness) -> None:
    _, weights = harness.new_version()
    missing = next(name for name in weights if "layers.0.mlp.up_proj.lora_B" in name)
    refuse(harness, harness.write({name: w for name, w in weights.items() if name != missing}), "A and B", "up_proj")


@pytest.mark.parametrize("half", ["A", "B"])
def test_a_tensor_of_another_size_is_refused(harness: Harness, half: str) -> None:
    """It would leave a part of the slot as it was."""
    _, weights = harness.new_version()
    name = next(name for name in weights if f"layers.1.mlp.down_proj.lora_{half}" in name)
    weights[name] = weights[name][:, :-1] if half == "A" else weights[name][:-1]
    refuse(harness, harness.write(weights), "layers.1.mlp.down_proj", "its layer's slots are")


@pytest.mark.parametrize("transport", ["memory", "disk"])
def test_corrupted_bytes_are_refused(harness: Harness, transport: Transport) -> None:
    _, weights = harness.new_version()
    ticket = harness.write(weights, transport)
    with open(ticket.location, "r+b") as file:
        file.seek(-4, os.SEEK_END)
        last = file.read(4)
        file.seek(-4, os.SEEK_END)
        file.write(bytes([last[0] ^ 1, *last[1:]]))
    refuse(harness, ticket, ticket.digest, "rank 0", "already as they arrived")


def test_another_dtype_is_refused(harness: Harness) -> None:
    _, weights = harness.new_version()
    ticket = make_writer("memory", "bfloat16", f"{harness.segment}bf16").write(weights, 1.0)
    refuse(harness, ticket, "bfloat16", "float32")


def test_a_version_is_immutable(harness: Harness) -> None:
    harness.assert_a_version_is_immutable()


def test_a_cancelled_request_does_not_run_on(harness: Harness) -> None:
    version, _ = harness.publish()

    async def run() -> tuple[int, int, int]:
        request = GenerationRequest(PROMPT, version, max_tokens=450, n=4, seed=3)
        before = harness.engine.statistics().num_generated_tokens
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(harness.engine.generate, request)
            await harness.wait_for_tokens(before + 20)
            tasks.cancel_scope.cancel()
        await anyio.sleep(0.3)
        stopped = harness.engine.statistics().num_generated_tokens
        await anyio.sleep(0.3)
        quiet = harness.engine.statistics().num_generated_tokens
        await harness.engine.generate(replace(request, max_tokens=2, n=1))
        return stopped - before, quiet - stopped, harness.engine.statistics().num_running

    generated, afterwards, num_running = harness.do(run)
    assert 20 <= generated < 4 * 450
    assert (afterwards, num_running) == (0, 0)
    busy = harness.engine.statistics().busy_seconds
    time.sleep(0.05)
    assert harness.engine.statistics().busy_seconds == busy


def test_an_engine_that_dies_during_a_publish_ends_it(shared: Harness) -> None:
    """The last test of this file: it kills the engine."""
    [core] = [p for p in psutil.Process().children(recursive=True) if "EngineCore" in " ".join(p.cmdline())]
    ticket = shared.write(shared.new_version()[1])

    async def publish_and_kill() -> None:
        with anyio.fail_after(30):
            await publish_then_kill()

    async def publish_then_kill() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(shared.engine.publish, 99, ticket)
            await anyio.wait_all_tasks_blocked()  # until the publish waits for the stopped process
            core.kill()

    core.suspend()
    with pytest.raises(ExceptionGroup) as caught:
        shared.do(publish_and_kill)
    [error] = caught.value.exceptions
    assert isinstance(error, EngineError)
    assert "the vLLM engine process died" in str(error)
