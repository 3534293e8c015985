import asyncio
import json
import threading
import time
from pathlib import Path

import pytest

from rlloop.events import FLUSH_LINES, Events, chrome_trace


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_per_span(tmp_path: Path):
    clock = Clock()
    events = Events(tmp_path / "events.jsonl", clock=clock)
    with events.span("rollout", "engine", policy_version=3, ordinal=7):
        clock.now += 1.5
        events.record("admit", "loop", 101.5, 101.5, slots=2)
    with pytest.raises(ValueError, match="bad reward"), events.span("score", "scorer"):
        raise ValueError("bad reward")
    events.close()
    assert lines(tmp_path / "events.jsonl") == [
        {
            "name": "admit",
            "resource": "loop",
            "start": 101.5,
            "end": 101.5,
            "policy_version": None,
            "fields": {"slots": 2},
        },
        {
            "name": "rollout",
            "resource": "engine",
            "start": 100.0,
            "end": 101.5,
            "policy_version": 3,
            "fields": {"ordinal": 7},
        },
        {
            "name": "score",
            "resource": "scorer",
            "start": 101.5,
            "end": 101.5,
            "policy_version": None,
            "fields": {},
            "error": "ValueError: bad reward",
        },
    ]


def test_a_cancelled_span_ends_and_says_so(tmp_path: Path):
    events = Events(tmp_path / "events.jsonl")

    async def main() -> None:
        async def forever() -> None:
            with events.span("rollout", "engine"):
                await asyncio.Event().wait()

        task = asyncio.create_task(forever())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(main())
    events.close()
    assert lines(tmp_path / "events.jsonl")[0]["error"].startswith("CancelledError")


def test_buffered_until_flush_and_bounded(tmp_path: Path):
    path = tmp_path / "events.jsonl"
    events = Events(path)
    events.record("a", "loop", 1.0, 2.0)
    assert path.read_text() == ""
    events.flush()
    assert len(lines(path)) == 1
    for _ in range(FLUSH_LINES):
        events.record("b", "loop", 1.0, 2.0)
    assert len(lines(path)) == 1 + FLUSH_LINES
    events.close()
    events.close()


def test_two_writers_never_tear_a_line(tmp_path: Path):
    path = tmp_path / "events.jsonl"

    def write(name: str) -> None:
        events = Events(path)
        for number in range(3000):
            events.record(name, "loop", 1.0, 2.0, text="x" * (number % 300))
            if number % 7 == 0:
                events.flush()
        events.close()

    threads = [threading.Thread(target=write, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lines(path)) == 6000


def test_a_full_disk_costs_lines_but_not_the_run(caplog: pytest.LogCaptureFixture):
    events = Events(Path("/dev/full"))
    for _ in range(3):
        events.record("a", "loop", 1.0, 2.0)
        events.flush()
    events.close()
    assert [record.message for record in caplog.records] == [
        "events.jsonl failed, the run goes on; later failures are only counted"
    ]


def test_fifty_thousand_spans_a_second(tmp_path: Path):
    events = Events(tmp_path / "events.jsonl")

    def rate() -> float:
        start = time.process_time()
        for ordinal in range(10_000):
            with events.span("rollout", "engine", policy_version=3, ordinal=ordinal):
                pass
        return 10_000 / (time.process_time() - start)

    assert max(rate() for _ in range(5)) > 50_000
    events.close()
    assert len(lines(tmp_path / "events.jsonl")) == 50_000


def test_chrome_trace_gives_overlapping_spans_lanes(tmp_path: Path):
    clock = Clock()
    events = Events(tmp_path / "events.jsonl", clock=clock)
    with events.span("a", "engine", policy_version=1):
        clock.now = 101
        with events.span("b", "engine"):
            clock.now = 102
    with events.span("c", "engine"), events.span("step", "trainer"):
        clock.now = 103
    events.record("refit", "loop", 103.0, 103.0)
    events.close()
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"name": "torn by a ki')
    chrome_trace(str(tmp_path / "events.jsonl"), str(tmp_path / "trace.json"))
    trace = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in trace if event["ph"] == "M"}
    placed = {e["name"]: (names[e["pid"]], e["tid"], e["ts"], e.get("dur")) for e in trace if e["ph"] != "M"}
    assert placed == {
        "a": ("engine", 0, 100e6, 2e6),
        "b": ("engine", 1, 101e6, 1e6),
        "c": ("engine", 0, 102e6, 1e6),
        "step": ("trainer", 0, 102e6, 1e6),
        "refit": ("loop", 0, 103e6, None),
    }
