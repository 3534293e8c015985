"""Against real wandb, in a fresh interpreter each (wandb keeps global state), with servers on loopback that misbehave."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rlloop.tracking.files import read_metrics

NUM_STEPS = 50
RUN = """
import json, sys, time
from pathlib import Path
from contextlib import ExitStack
from rlloop.config import RunSettings
from rlloop.processes import guard
from rlloop.tracking import open_trackers

stack = ExitStack()
stack.enter_context(guard())  # which ends wandb's service, too
mode, run_dir, attempt = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
settings = RunSettings.model_validate({"tracking": {"wandb": mode}, "num_steps": 50})
start = time.monotonic()
trackers = open_trackers(settings, run_dir, attempt)
opened = time.monotonic()
calls = []
for step in range(1, 51):
    before = time.monotonic()
    trackers.log(step, {"reward/mean": step / 50, "optim/grad_norm": float("nan")})
    calls.append(time.monotonic() - before)
    if step % 10 == 0:
        trackers.evaluation(step - 5, {"eval/reward_mean": 0.5, "eval/reward_stderr": 0.1, "eval/prompts": 16.0})
        trackers.completions(step, [{"prompt": "1+1", "text": "2", "reward": 1.0}] * 4)
    time.sleep(0.02)
while mode == "online" and not list(run_dir.glob("wandb/*run-*")):
    time.sleep(0.1)  # a slow machine imports and starts it for longer than these steps take; close() waits 10 s for the rest
before = time.monotonic()
trackers.close()
closed = time.monotonic()
stack.close()
print(json.dumps({"open": opened - start, "calls": calls, "close": closed - before, "end": time.time()}))
"""


def run(run_dir: Path, mode: str, base_url: str = "http://127.0.0.1:9", attempt: int = 1) -> tuple[dict[str, Any], str]:
    environment = {
        **os.environ,
        "WANDB_BASE_URL": base_url,
        "WANDB_API_KEY": "0" * 40,
        "WANDB_DIR": str(run_dir),
        "WANDB_CONFIG_DIR": str(run_dir),
        "WANDB_CACHE_DIR": str(run_dir),
        "HOME": str(run_dir),
        "no_proxy": "127.0.0.1",
    }
    process = subprocess.run(
        [sys.executable, "-c", RUN, mode, str(run_dir), str(attempt)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=40,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1]), process.stderr


def offline_runs(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "wandb").glob("offline-run-*"))


@pytest.fixture
def hanging_server() -> Iterator[str]:
    """Accepts connections and never answers."""
    connections = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    connections.append(server.accept()[0])
                except OSError:  # the test is over
                    return

        thread = threading.Thread(target=accept)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
        for connection in connections:
            connection.close()


@pytest.fixture
def refusing_server() -> Iterator[str]:
    """Answers every request with 500."""

    class Refuse(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(500)

        do_POST = do_GET  # noqa: N815 - the name that http.server looks up

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refuse) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def failing_later_server() -> Iterator[str]:
    """Answers until a run has begun, then hangs."""
    begun, over = threading.Event(), threading.Event()

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(405)

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"]))) if not begun.is_set() else {}
            if begun.is_set():
                over.wait()
                return
            data: dict[str, Any] = {"model": None}  # RunResumeStatus: no such run yet
            if "viewer" in request["query"]:
                data = {"viewer": {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
            if "upsertBucket" in request["query"]:
                project = {"id": "p", "name": "rlloop", "entity": {"id": "e", "name": "me"}}
                bucket = {"id": "b", "name": request["variables"]["name"], "config": "{}", "project": project}
                data = {"upsertBucket": {"bucket": bucket, "inserted": True}}
                begun.set()
            body = json.dumps({"data": data}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        over.set()
        server.shutdown()
        thread.join()


def check_unharmed(run_dir: Path, timing: dict[str, Any]) -> None:
    """The loop did not notice, and the record is complete."""
    assert timing["open"] < 2  # of the 5 s and more that finding out takes
    assert sorted(timing["calls"])[NUM_STEPS // 2] < 1e-3
    assert max(timing["calls"]) < 0.5  # the interpreter lock, while another thread imports wandb
    assert [line["step"] for line in read_metrics(run_dir)] == list(range(1, NUM_STEPS + 1))
    assert len(list((run_dir / "completions").iterdir())) == 5


def test_hanging_server_falls_back_to_offline(tmp_path: Path, hanging_server: str):
    timing, stderr = run(tmp_path, "online", hanging_server)
    check_unharmed(tmp_path, timing)
    assert timing["close"] < 10.5
    assert "cannot be used (TimeoutError: timed out): offline" in stderr
    (folder,) = offline_runs(tmp_path)
    assert folder.name.endswith((tmp_path / "wandb_run_id").read_text())
    data = next(folder.glob("run-*.wandb")).read_bytes()
    assert b"reward/mean" in data
    assert len(list((folder / "files" / "media" / "table").glob("*.json"))) == 5


@pytest.mark.parametrize("server", ["refusing_server", "dead"])
def test_failing_server_falls_back_to_offline(tmp_path: Path, server: str, request: pytest.FixtureRequest):
    url = "http://127.0.0.1:9" if server == "dead" else request.getfixturevalue(server)
    timing, stderr = run(tmp_path, "online", url)
    check_unharmed(tmp_path, timing)
    assert f"W&B at {url} cannot be used" in stderr
    assert len(offline_runs(tmp_path)) == 1


def test_an_outage_in_the_middle_of_an_online_run(tmp_path: Path, failing_later_server: str):
    timing, _ = run(tmp_path, "online", failing_later_server)  # and the process ends, within the limit there
    check_unharmed(tmp_path, timing)
    assert timing["close"] < 10.5
    assert not offline_runs(tmp_path)
    (folder,) = (tmp_path / "wandb").glob("run-*")
    assert folder.name.endswith((tmp_path / "wandb_run_id").read_text())
    assert b"reward/mean" in next(folder.glob("run-*.wandb")).read_bytes()  # for `wandb sync`


def test_a_second_attempt_continues_the_same_run(tmp_path: Path):
    for attempt in (1, 2):
        _, stderr = run(tmp_path, "offline", attempt=attempt)
        assert "W&B" not in stderr
        assert "Traceback" not in stderr
    first, second = offline_runs(tmp_path)
    assert first.name.rpartition("-")[2] == second.name.rpartition("-")[2] == (tmp_path / "wandb_run_id").read_text()
