import logging
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlloop.config import RunSettings
from rlloop.errors import ConfigError
from rlloop.tracking import Trackers, check_trackers, open_trackers
from rlloop.tracking.background import Background
from rlloop.tracking.files import Files, read_metrics


class Recorder:
    """Keeps what it gets; waits for `gate` before each call."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.tables: list[tuple[int, list[Any]]] = []
        self.closed = False
        self.threads: set[str] = set()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.gate.wait()
        self.threads.add(threading.current_thread().name)
        self.logged.append((step, dict(metrics)))

    def completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self.tables.append((step, list(rows)))

    def close(self) -> None:
        self.closed = True


class Raiser(Recorder):
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        raise RuntimeError("server said 500")


def test_everything_arrives_in_order_in_another_thread():
    sink = Recorder()
    background = Background("sink", lambda: sink)
    metrics = {"a": 1.0}
    background.log(1, metrics)
    metrics["a"] = 2.0  # the caller may re-use its dict
    background.completions(1, [{"text": "x"}])
    background.log(2, metrics)
    background.close()
    assert sink.logged == [(1, {"a": 1.0}), (2, {"a": 2.0})]
    assert sink.tables == [(1, [{"text": "x"}])]
    assert sink.closed
    assert sink.threads == {"rlloop-sink"}
    assert (background.dropped, background.failures) == (0, 0)


def test_a_full_queue_drops_and_counts_and_never_waits(caplog: pytest.LogCaptureFixture):
    sink = Recorder()
    sink.gate.clear()
    background = Background("sink", lambda: sink, capacity=4, close_seconds=10)
    start = time.monotonic()
    for step in range(100):
        background.log(step, {})
    assert time.monotonic() - start < 0.5
    assert background.dropped in (95, 96)  # 4 queued, and one with the sink if its thread was quick
    sink.gate.set()
    background.close()
    assert len(sink.logged) == 100 - background.dropped
    assert sink.closed
    assert [record.message for record in caplog.records] == [
        "sink does not keep up: dropping (metrics.jsonl is complete)",
        f"sink: {background.dropped} calls dropped, 0 failed",
    ]


@pytest.mark.parametrize("num_calls", [1, 20], ids=["queue with room", "full queue"])
def test_close_is_bounded(num_calls: int, caplog: pytest.LogCaptureFixture):
    sink = Recorder()
    sink.gate.clear()
    background = Background("sink", lambda: sink, capacity=4, close_seconds=0.2)
    for step in range(num_calls):
        background.log(step, {})
    start = time.monotonic()
    background.close()
    assert 0.15 < time.monotonic() - start < 1
    assert "did not finish within" in caplog.text
    sink.gate.set()


def test_a_sink_that_cannot_be_opened_costs_nothing(caplog: pytest.LogCaptureFixture):
    def refuse() -> Recorder:
        raise OSError("no such server")

    background = Background("sink", refuse)
    background._thread.join()
    for step in range(3):
        background.log(step, {})
    background.close()
    assert background.failures == 1
    assert background.dropped == 3
    assert "no such server" in caplog.text


def test_a_raising_sink_is_warned_about_once_and_goes_on_being_called(caplog: pytest.LogCaptureFixture):
    background = Background("sink", Raiser)
    for step in range(3):
        background.log(step, {})
    background.close()
    assert background.failures == 3
    assert caplog.text.count("RuntimeError: server said 500") == 1


def test_one_raising_sink_leaves_the_others_alone(caplog: pytest.LogCaptureFixture):
    good = Recorder()
    trackers = Trackers({"bad": Raiser(), "good": good}, lambda text: None)
    for step in range(3):
        trackers.log(step, {"a": 1.0})
    trackers.completions(2, [{"text": "x"}])
    trackers.close()
    assert [step for step, _ in good.logged] == [0, 1, 2]
    assert good.tables
    assert good.closed
    assert caplog.text.count("RuntimeError: server said 500") == 1
    assert caplog.records[-1].message == "bad failed 3 times"
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_keyboard_interrupt_is_not_swallowed():
    class Interrupted(Recorder):
        def log(self, step: int, metrics: Mapping[str, float]) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trackers({"sink": Interrupted()}, lambda text: None).log(1, {})


def test_files_and_terminal_are_always_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trackers = open_trackers(RunSettings(num_steps=3), tmp_path, attempt=1)
    trackers.status("starting engine")
    trackers.log(1, {"reward/mean": 0.25})
    trackers.completions(1, [{"text": "x"}])
    trackers.close()
    assert [line["reward/mean"] for line in read_metrics(tmp_path)] == [0.25]
    assert (tmp_path / "completions" / "step_000001.jsonl").exists()
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "starting engine"
    assert out[1].startswith("step 1/3  reward 0.250")


def test_missing_wandb_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    settings = RunSettings.model_validate({"tracking": {"wandb": "online"}})
    with pytest.raises(ConfigError, match=r"--tracking.wandb online.*pip install rlloop\[wandb\]"):
        check_trackers(settings)


def test_a_full_disk_under_metrics_does_not_stop_the_loop(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    trackers = Trackers({"files": Files(tmp_path, 1)}, lambda text: None)
    trackers.log(1, {"a": 1.0})
    trackers.log(2, {"a": 1.0})
    trackers.close()
    assert caplog.records[-1].message == "files failed 3 times"  # the last at its end
