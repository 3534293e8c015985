"""Weights in buckets, between threads instead of processes."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlloop.errors import RefitError
from rlloop.refit import stream
from rlloop.refit.stream import WeightsReader, WeightsSender
from rlloop.refit.transports import SHARED_MEMORY
from rlloop.refit.whole import Whole, load_in_place
from rlloop.trainer.ranks import Interrupted
from rlloop.types import Transport

SIZES = [(3, 5), (7,), (64, 9), (1,), (2, 3, 4), (8, 8), (100,), (5,)]
Weights = dict[str, torch.Tensor]


def make_weights(seed: int = 0) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {f"w{number}": torch.randn(size, generator=generator) for number, size in enumerate(SIZES)}


@pytest.fixture
def name() -> Iterator[str]:
    name = f"rlloop-test-{uuid.uuid4().hex}"
    yield name
    assert not list(SHARED_MEMORY.glob(f"{name}*"))


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as threads:
        yield threads


def read(reader: WeightsReader, address: str) -> Weights:
    """A tensor is valid until the next is asked for."""
    return {name: tensor.clone() for name, tensor in reader.read(reader.connect(address))}


def never() -> None:
    pass


@pytest.mark.parametrize("bucket_bytes", [4, 400, 1 << 20])  # one tensor each, several, all in one; 4 is less than any
@pytest.mark.parametrize(
    ("transport", "dtype"), [("memory", "float32"), ("memory", "bfloat16"), ("broadcast", "bfloat16")]
)
def test_every_reader_gets_every_weight(
    name: str, threads: ThreadPoolExecutor, bucket_bytes: int, transport: Transport, dtype: str
) -> None:
    sender = WeightsSender(transport, dtype, name, 2, bucket_bytes=bucket_bytes)
    sender.listen()
    readers = [WeightsReader(torch.device("cpu")) for _ in range(2)]
    for seed in range(3):  # buckets are used again
        weights = make_weights(seed)
        sent = threads.submit(sender.send, iter(weights.items()), never)
        for found in threads.map(lambda reader: read(reader, name), readers):
            assert list(found) == list(weights)
            for key, weight in weights.items():
                assert found[key].equal(weight.to(getattr(torch, dtype)))
        sent.result()
        num_bytes = sum(weight.numel() for weight in weights.values()) * getattr(torch, dtype).itemsize
        assert [reader.num_bytes for reader in readers] == [num_bytes] * 2
    sender.close()


def test_one_bucket_is_filled_while_another_is_read(name: str, threads: ThreadPoolExecutor) -> None:
    sender = WeightsSender("memory", "float32", name, 1, bucket_bytes=4)
    taken: Future[None] = Future()

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        yield from (("a", torch.ones(2)), ("b", torch.ones(3)))
        taken.set_result(None)

    sender.listen()
    sent = threads.submit(sender.send, weights(), never)
    reader = WeightsReader(torch.device("cpu"))
    stream = reader.read(reader.connect(name))
    assert next(stream)[0] == "a"
    taken.result(timeout=10)  # before "a" was read
    assert [key for key, _ in stream] == ["b"]
    sent.result()
    sender.close()


def test_a_reader_that_hangs_up_ends_it(name: str, threads: ThreadPoolExecutor) -> None:
    sender = WeightsSender("memory", "float32", name, 1, bucket_bytes=4)
    sender.listen()
    weights = iter(make_weights().items())
    sent = threads.submit(sender.send, weights, never)
    reader = WeightsReader(torch.device("cpu"))
    connection = reader.connect(name)
    next(reader.read(connection))
    connection.close()
    sent.result(timeout=10)
    assert next(weights, None) is not None, "those that nobody wants are not made"
    sent = threads.submit(sender.send, iter(make_weights().items()), never)
    assert list(read(reader, name)) == list(make_weights())
    sent.result()
    sender.close()


@pytest.mark.parametrize("transport", ["memory", "broadcast"])
def test_the_others_hear_of_a_reader_that_hangs_up(
    name: str, threads: ThreadPoolExecutor, transport: Transport
) -> None:
    sender = WeightsSender(transport, "float32", name, 2, bucket_bytes=4)
    sender.listen()
    sent = threads.submit(sender.send, iter(make_weights().items()), never)
    found = threads.submit(read, WeightsReader(torch.device("cpu")), name)
    WeightsReader(torch.device("cpu")).connect(name).close()
    with pytest.raises(RefitError):
        found.result(timeout=10)
    sent.result(timeout=10)
    sender.close()


def test_a_sender_that_hangs_up_is_an_error(name: str, threads: ThreadPoolExecutor) -> None:
    sender = WeightsSender("memory", "float32", name, 1, bucket_bytes=4)

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        yield from make_weights().items()
        raise ZeroDivisionError

    sender.listen()
    sent = threads.submit(sender.send, weights(), never)
    with pytest.raises(RefitError, match="hung up before all weights had come"):
        read(WeightsReader(torch.device("cpu")), name)
    with pytest.raises(ZeroDivisionError):
        sent.result()
    sender.close()


def test_a_sender_whom_nobody_asks_can_be_interrupted(name: str) -> None:
    def interrupt() -> None:
        raise Interrupted

    sender = WeightsSender("memory", "float32", name, 1)
    sender.listen()
    with pytest.raises(Interrupted):
        sender.send(iter(make_weights().items()), interrupt)
    with pytest.raises(OSError, match="refused"):
        WeightsReader(torch.device("cpu")).connect(name)
    with pytest.raises(RefitError, match=r"not all ranks .* an earlier version: start the backend anew"):
        sender.send(iter(make_weights().items()), lambda: None)
    sender.close()


def test_another_users_process_is_no_reader_and_no_trainer(
    name: str, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender = WeightsSender("memory", "float32", name, 1)
    sender.listen()
    with monkeypatch.context() as patched:
        patched.setattr(stream.os, "geteuid", lambda: -1)
        with pytest.raises(RefitError, match="another user's process listens"):
            WeightsReader(torch.device("cpu")).connect(name)
    turned_away = iter([False, False])  # the one before has gone, but is in the queue
    monkeypatch.setattr(stream, "_is_ours", lambda connected: next(turned_away, True))
    with stream.socket.socket(stream.socket.AF_UNIX) as stranger:
        stranger.connect(f"\0{name}")
        sent = threads.submit(sender.send, iter([*make_weights().items()]), never)
        assert stranger.recv(1) == b""  # hung up on
        assert read(WeightsReader(torch.device("cpu")), name).keys() == make_weights().keys()
        sent.result(10)
    sender.close()


def test_a_reader_without_the_others_is_not_left_waiting(
    name: str, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlloop.refit.stream.PATIENCE", 1.5)
    sender = WeightsSender("memory", "float32", name, 2)
    sender.listen()
    sent = threads.submit(sender.send, iter(make_weights().items()), never)
    with pytest.raises(RefitError, match="hung up"):
        read(WeightsReader(torch.device("cpu")), name)
    with pytest.raises(RefitError, match="not all of 2 ranks of engines asked"):
        sent.result()
    sender.close()


class FakeWorker:
    """That loads as vLLM does on a CPU: when all of a layer's weights have come, from what it has kept of them."""

    def __init__(self) -> None:
        self.model_runner = SimpleNamespace(device=torch.device("cpu"))
        self.kept: Weights = {}

    def reload_weights(self, weights_iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        self.kept = dict(weights_iterator)


def test_a_loader_may_keep_weights_while_buckets_are_used_again(name: str, threads: ThreadPoolExecutor) -> None:
    sender, worker = WeightsSender("memory", "float32", name, 1, bucket_bytes=4), FakeWorker()
    sender.listen()
    sent = threads.submit(sender.send, iter(make_weights().items()), never)
    whole = Whole(worker)
    whole.load(3, {"location": name, "digest": ""})
    whole.swap()
    sent.result()
    assert worker.kept.keys() == make_weights().keys()
    for key, weight in make_weights().items():
        assert worker.kept[key].equal(weight)
    sender.close()


class FakeStream:
    """Of one bucket that does not have the digest that it should."""

    def __init__(self, header: dict[str, Any]) -> None:
        self._header = header

    def __enter__(self) -> FakeStream:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def poll(self, seconds: float) -> bool:
        return True

    def recv(self) -> dict[str, Any]:
        return self._header


def test_what_is_not_as_it_was_sent_is_refused(name: str) -> None:
    path = SHARED_MEMORY / name
    path.write_bytes(b"\0" * 16)
    header = {"manifest": [("w", (4,))], "digest": "another", "dtype": "float32", "transport": "memory"}
    stream: Any = FakeStream({**header, "location": str(path), "num_bytes": 16})
    with pytest.raises(RefitError, match="did not arrive as they were sent, in those from w on"):
        list(WeightsReader(torch.device("cpu")).read(stream))
    path.unlink()


class FakeModel(torch.nn.Linear):
    """That takes, as vLLM's do, what it knows."""

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> set[str]:
        own = dict(self.named_parameters())
        found = {key: weight for key, weight in weights if key in own}
        for key, weight in found.items():
            own[key].data.copy_(weight)
        return {*found}


def test_weights_that_did_not_come_are_an_error() -> None:
    model = FakeModel(2, 3)
    bias = torch.randn(3)
    with pytest.raises(ValueError, match=r"1 weights of the engine's model did not come, for example \['weight'\]"):
        load_in_place(model, iter([("bias", bias), ("other", bias)]))
    load_in_place(model, iter([("bias", bias), ("weight", torch.ones(3, 2))]))
    assert model.bias.equal(bias)
