"""Benchmarks that take seconds run as they are; the others are only type-checked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_loop_overhead() -> None:
    program = "from loop_overhead import measure; print([measure(w, 80, 400)[0]['samples/s'] > 0 for w in ('loop', 'data path')])"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=BENCHMARKS, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[True, True]\n"
