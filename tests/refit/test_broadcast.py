"""A broadcast between threads instead of processes, through Gloo."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import psutil
import pytest
import torch

from rlloop.errors import RefitError
from rlloop.refit import broadcast
from rlloop.refit.broadcast import Broadcast, Receiver

CPU = torch.device("cpu")


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as threads:
        yield threads


@pytest.fixture
def sender() -> Iterator[Broadcast]:
    sender = pickle.loads(pickle.dumps(Broadcast("float32", 2)))  # as it travels to the trainer's rank
    yield sender
    sender.close()


def offer(sender: Broadcast, *values: float) -> str:
    flat = sender.flat(len(values), CPU)
    flat.copy_(torch.tensor(values))
    return sender.offer(flat)


class Workers:
    """Of two engines."""

    def __init__(self, location: str, threads: ThreadPoolExecutor) -> None:
        self.receivers = [Receiver(location.rpartition(":")[0], CPU) for _ in range(2)]
        self._threads = threads

    def receive(self, location: str, size: int, *which: int) -> list[Future[list[float]]]:
        def one(receiver: Receiver) -> list[float]:
            flat = torch.full((size,), torch.nan)
            receiver.receive(int(location.rpartition(":")[2]), flat)
            return flat.tolist()

        return [self._threads.submit(one, self.receivers[index]) for index in which or (0, 1)]


def test_every_reader_gets_every_version(sender: Broadcast, threads: ThreadPoolExecutor) -> None:
    location = offer(sender, 1.0, 2.0)
    workers = Workers(location, threads)
    for values in ([1.0, 2.0], [3.0, 4.0, 5.0], [6.0]):
        if values != [1.0, 2.0]:
            location = offer(sender, *values)
        assert [each.result(10) for each in workers.receive(location, len(values))] == [values] * 2


def test_it_waits_for_all_readers(sender: Broadcast, threads: ThreadPoolExecutor) -> None:
    location = offer(sender, 1.0)
    workers = Workers(location, threads)
    (first,) = workers.receive(location, 1, 0)
    with pytest.raises(TimeoutError):
        first.result(0.2)
    (second,) = workers.receive(location, 1, 1)
    assert first.result(10) == second.result(10) == [1.0]


def test_what_nobody_came_for_is_given_up(sender: Broadcast, threads: ThreadPoolExecutor) -> None:
    """A run was stopped between its export and its engines."""
    old = offer(sender, 1.0)
    location = offer(sender, 2.0)
    workers = Workers(location, threads)
    assert [each.result(10) for each in workers.receive(location, 1)] == [[2.0]] * 2
    for late in workers.receive(old, 1):
        with pytest.raises(RefitError, match="once, and in turn"):
            late.result(10)
    (alone,) = Workers(location, threads).receive(old, 1, 0)
    with pytest.raises(RefitError, match="sends these no more"):
        alone.result(10)


def test_a_reader_without_the_others_is_not_left_waiting(
    sender: Broadcast, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broadcast, "PATIENCE", 0.2)
    location = offer(sender, 1.0)
    workers = Workers(location, threads)
    (alone,) = workers.receive(location, 1, 0)
    with pytest.raises(RefitError, match=r"not all of 2 ranks .* within 0.2 s"):
        alone.result(10)
    (late,) = workers.receive(location, 1, 1)  # does not begin without it
    with pytest.raises(RefitError, match="not all of 2 ranks"):
        late.result(10)
    monkeypatch.undo()
    location = offer(sender, 2.0)
    assert [each.result(10) for each in workers.receive(location, 1)] == [[2.0]] * 2


def test_a_broadcast_that_failed_is_told_once_and_the_next_is_as_before(
    sender: Broadcast, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    location = offer(sender, 1.0)
    workers = Workers(location, threads)
    with monkeypatch.context() as patched:
        patched.setattr(broadcast._Group, "_make", fail)
        for each in workers.receive(location, 1):
            with pytest.raises(ZeroDivisionError):
                each.result(10)
        with pytest.raises(RefitError, match="could not be broadcast"):
            sender.withdraw()
    for value in (2.0, 3.0):
        location = offer(sender, value)
        assert [each.result(10) for each in workers.receive(location, 1)] == [[value]] * 2


def test_the_network_is_not_listened_to(sender: Broadcast) -> None:
    port = int(offer(sender, 1.0).split(":")[1])
    listening = [each.laddr for each in psutil.Process().net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    assert [each.ip for each in listening if each.port == port] == ["127.0.0.1"]
