import json
import os
import subprocess
import sys
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlloop.config import CurriculumSettings
from rlloop.errors import RunDirectoryError
from rlloop.ledger import Ledger, derive_seed, fingerprint


def take(ledger: Ledger, number: int) -> list[int]:
    return [ledger.next()[0] for _ in range(number)]


def reload(ledger: Ledger) -> Ledger:
    state = json.loads(json.dumps(ledger.state()))
    return Ledger.restore(state, ledger.num_tasks, ledger.seed, ledger.fingerprint)


def test_each_epoch_is_a_permutation_of_its_own():
    ledger = Ledger(50, seed=3, fingerprint="f")
    prompts = [ledger.next() for _ in range(150)]
    epochs = [[index for _, index, _ in prompts[start : start + 50]] for start in (0, 50, 100)]
    assert [ordinal for ordinal, _, _ in prompts] == list(range(150))
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(50))
    assert len({seed for _, _, seed in prompts}) == 150
    assert all(0 <= seed < 2**31 for _, _, seed in prompts)


def test_derived_seeds_never_change() -> None:
    assert [derive_seed(0, 0), derive_seed(0, 1), derive_seed(77, 3)] == [1607770444, 656268352, 2430958935]
    assert derive_seed(1, 2) != derive_seed(2, 1)


def test_order_and_seeds_are_fixed_by_the_run_seed():
    def prompts(seed: int) -> list[tuple[int, int, int]]:
        ledger = Ledger(20, seed, "f")
        return [ledger.next() for _ in range(45)]

    assert prompts(0) == prompts(0)
    assert prompts(0) != prompts(1)
    # Literal values: they must not change between releases, or a resumed run would see other prompts.
    assert prompts(0)[:3] == [(0, 11, 803885222), (1, 3, 328134176), (2, 13, 1669331788)]


def test_resume_admits_what_was_in_flight_again_and_in_order():
    ledger = Ledger(10, 0, "f")
    first = [ledger.next() for _ in range(8)]
    ledger.trained([1, 4], step=1)
    ledger.dropped(0, "stale")
    assert (ledger.low_water, ledger.state()["done"]) == (2, [4])

    resumed = reload(ledger)
    assert resumed.num_in_flight == 0
    assert [resumed.next() for _ in range(5)] == [first[2], first[3], first[5], first[6], first[7]]
    assert resumed.counts == {"trained": 2, "stale": 1, "failed": 0, "filtered": 0, "too_long": 0, "curriculum": 0}


def test_what_was_done_before_a_resume_is_not_asked_again_by_a_run_with_fewer_slots():
    ledger = Ledger(40, 0, "f")
    take(ledger, 12)
    ledger.trained(range(2, 11), 1)
    resumed, given = reload(ledger), []
    for step in range(2, 7):
        given += take(resumed, 1)
        resumed.trained(given[-1:], step)
    assert given == [0, 1, 11, 12, 13]


def test_a_stragglers_answer_does_not_count_once_its_prompt_was_answered_in_the_next_epoch():
    ledger = Ledger(2, 0, "f", CurriculumSettings(keep=0.5))
    prompts = [ledger.next() for _ in range(4)]
    task = prompts[0][1]
    [second] = [prompt for prompt in prompts[2:] if prompt[1] == task]
    ledger.answered(second[0], task, 0.5)
    ledger.answered(prompts[0][0], task, 0.0)
    assert ledger.state()["pass_rates"] == [[task, 1, 0.5]]


def test_a_curriculum_passes_over_what_is_solved_or_hopeless():
    ledger = Ledger(300, 0, "f", CurriculumSettings(keep=0.25))
    assert ledger.next() == Ledger(300, 0, "f").next()
    for _ in range(299):  # of an epoch that nothing is known of before
        ordinal, index, _ = ledger.next()
        ledger.answered(ordinal, index, (0.0, 0.5, 1.0)[index % 3])
    second, (ordinal, index, _) = [], ledger.next()
    while ordinal < 600:
        second.append(index)
        ordinal, index, _ = ledger.next()
    assert (
        sum(index % 3 == 1 for index in second) >= 99
    )  # all that are half solved, but for one that may have no rate yet
    assert 30 <= sum(index % 3 != 1 for index in second) <= 70  # a quarter of the other 200
    assert ledger.counts["curriculum"] == (300 - len(second)) + (ordinal - 600)

    resumed = Ledger.restore(json.loads(json.dumps(ledger.state())), 300, 0, "f", CurriculumSettings(keep=0.25))
    assert resumed.state() == ledger.state()


def test_an_answer_that_waited_for_its_step_at_a_checkpoint_is_asked_for_again():
    """It must not be judged by itself: a critic learns from it, though all of its rewards are equal."""
    curriculum = CurriculumSettings(keep=0.01)
    ledger = Ledger(10, 0, "f", curriculum)
    prompts = [ledger.next() for _ in range(6)]
    for ordinal, index, _ in prompts:
        ledger.answered(ordinal, index, 1.0)
    ledger.trained([0, 1], 1)
    resumed = Ledger.restore(json.loads(json.dumps(ledger.state())), 10, 0, "f", curriculum)
    assert [resumed.next() for _ in range(4)] == prompts[2:]


def test_without_a_curriculum_pass_rates_are_not_kept():
    ledger = Ledger(10, 0, "f")
    ledger.answered(3, 3, 0.5)
    assert ledger.state()["pass_rates"] == []


def test_memory_is_bounded_by_what_is_in_flight():
    ledger = Ledger(1000, 0, "f")
    pending = take(ledger, 16)
    for step in range(1, 2000):
        pending += take(ledger, 1)
        ledger.trained([pending.pop(step % 8)], step)
        assert len(ledger.state()["done"]) <= 200
    assert ledger.num_in_flight == 16


def test_illegal_transitions_raise_and_change_nothing():
    ledger = Ledger(10, 0, "f")
    take(ledger, 4)
    ledger.trained([0], step=2)
    ledger.dropped(1, "failed")
    before = ledger.state()
    with pytest.raises(ValueError, match=r"prompts \[0\] .* not in flight"):
        ledger.trained([2, 0], step=3)
    with pytest.raises(ValueError, match=r"prompts \[1\] cannot become stale"):
        ledger.dropped(1, "stale")
    with pytest.raises(ValueError, match=r"prompts \[9\]"):
        ledger.trained([9], step=3)
    with pytest.raises(ValueError, match="trains a prompt twice"):
        ledger.trained([2, 2], step=3)
    with pytest.raises(ValueError, match="step 1 is recorded after step 2"):
        ledger.trained([2], step=1)
    with pytest.raises(ValueError, match="not 'bored'"):
        ledger.dropped(2, "bored")  # type: ignore[arg-type]
    assert (ledger.state(), ledger.num_in_flight) == (before, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "--seed was 0 and is 1"),
        ({"num_tasks": 11}, "the number of tasks was 10 and is 11"),
        ({"fingerprint": "g"}, "the fingerprint of the tasks was f and is g"),
    ],
)
def test_restore_refuses_other_prompts(change, message):
    state = Ledger(10, 0, "f").state()
    with pytest.raises(RunDirectoryError, match=f"{message}.*new run with another --run-dir"):
        Ledger.restore(state, **({"num_tasks": 10, "seed": 0, "fingerprint": "f"} | change))


@dataclass
class Task:
    question: str
    tags: set[str] = field(default_factory=lambda: {"a", "b", "c", "d"})


class Plain:
    def __init__(self, answer: int) -> None:
        self.answer = answer


def sample_fingerprint(question: str = "1 + 1", answer: int = 2, last: float = 2.0) -> str:
    tasks = [
        {"question": question, "answer": 2},
        Task("?"),
        Plain(answer),
        np.array([1.0, last]),
        {(1, 2): None},
        object(),
        print,
    ]
    return fingerprint("env", {"level": 1}, 100, tasks)


def test_fingerprint_sees_every_change_of_a_task():
    prints = {
        sample_fingerprint(),
        sample_fingerprint(question="1 + 2"),
        sample_fingerprint(answer=3),
        sample_fingerprint(last=2.5),
        fingerprint("env", {"level": 2}, 100, []),
        fingerprint("env", {"level": 1}, 101, []),
        fingerprint("other", {"level": 1}, 100, []),
    }
    assert len(prints) == 7
    assert all(len(text) == 64 for text in prints)


def test_fingerprint_is_equal_in_every_process():
    code = (
        "import importlib.util as u, sys; s = u.spec_from_file_location('m', sys.argv[1]); m = u.module_from_spec(s);"
        "sys.modules['m'] = m; s.loader.exec_module(m); print(m.sample_fingerprint())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, __file__],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == sample_fingerprint()


def test_fingerprint_has_no_addresses():
    class Named:
        def __init__(self, address: str) -> None:
            self.address = address

        __slots__ = ("address",)

        def __repr__(self) -> str:
            return f"Generator(PCG64) at 0x{self.address}"

    assert fingerprint("env", {}, 1, [Named("7F9D20C27760")]) == fingerprint("env", {}, 1, [Named("7f9d20c27d80")])


class SimulatedRun:
    """Rollouts end in any order; training, checkpoints, kills. `log` is what the surviving weights have seen."""

    num_tasks, every, num_epochs = 7, 2, 2

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.disk: dict[int, tuple[str, int]] = {}  # step -> (ledger state, length of the log): the folders
        self.log: list[tuple[int, str]] = []
        self.kills = 0
        self.resume()

    def choose(self, *options: str) -> str:
        return self.data.draw(st.sampled_from(options))

    def resume(self) -> None:
        self.step = max(self.disk, default=0)
        if self.step:
            state, length = self.disk[self.step]
            self.ledger = Ledger.restore(json.loads(state), self.num_tasks, 5, "f")
        else:
            self.ledger, length = Ledger(self.num_tasks, 5, "f"), 0
        del self.log[length:]
        self.groups_per_step = self.data.draw(st.integers(1, 2))  # which a resumed run may change
        self.num_slots = self.data.draw(st.sampled_from((self.groups_per_step, 6)))
        self.running: list[int] = []
        self.finished: list[int] = []

    def killed(self) -> bool:
        """Whether the run is killed here; twice in a row too."""
        if self.kills >= 4 or self.choose("on", "on", "on", "kill") == "on":
            return False
        self.kills += 1
        self.resume()
        return True

    def run(self) -> None:
        while self.ledger.low_water < self.num_tasks * self.num_epochs:
            while len(self.running) + len(self.finished) < self.num_slots:
                self.running.append(self.ledger.next()[0])
            ordinal = self.running.pop(self.data.draw(st.integers(0, len(self.running) - 1)))
            what = self.choose("finished", "finished", "finished", "stale", "failed", "filtered", "too_long")
            if what == "finished":
                self.finished.append(ordinal)
            else:
                self.ledger.dropped(ordinal, what)  # type: ignore[arg-type]
                self.log.append((ordinal, what))
            if len(self.finished) >= self.groups_per_step and not self.killed():
                self.train()

    def train(self) -> None:
        batch = [self.finished.pop(0) for _ in range(self.groups_per_step)]
        self.log += [(ordinal, "trained") for ordinal in batch]
        self.step += 1
        if self.killed():  # the weights have moved, the ledger has not heard of it
            return
        self.ledger.trained(batch, self.step)
        if self.step % self.every == 0 and not self.killed():
            self.disk[self.step] = json.dumps(self.ledger.state()), len(self.log)
            self.killed()  # between the folder's rename and `latest`: the folder counts


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_prompt_is_lost_or_trained_twice(data):
    run = SimulatedRun(data)
    run.run()

    low_water = run.num_tasks * run.num_epochs
    done = [ordinal for ordinal, _ in run.log]
    assert len(done) == len(set(done))
    assert set(range(low_water)) <= set(done)
    for what, number in run.ledger.counts.items():
        assert number == sum(1 for _, reason in run.log if reason == what)
    whole = Ledger(run.num_tasks, 5, "f")
    indices = [whole.next()[1] for _ in range(low_water)]
    for start in range(0, low_water, run.num_tasks):
        assert sorted(indices[start : start + run.num_tasks]) == list(range(run.num_tasks))


def test_a_resumed_run_does_not_go_back_in_steps():
    ledger = Ledger(10, 0, "f")
    take(ledger, 2)
    ledger.trained([0], step=3)
    resumed = reload(ledger)
    take(resumed, 1)
    with pytest.raises(ValueError, match="step 2 is recorded after step 3"):
        resumed.trained([1], step=2)
