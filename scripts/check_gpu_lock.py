"""Does requirements/gpu.txt still fit what pyproject.toml declares? `--write` resolves it anew.

    .venv/bin/python scripts/check_gpu_lock.py [--write]

uv keeps what the lock pins, so the result differs only where the two do not fit each other. Where no package index can be
reached it says so and passes: that is no fault of the lock.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements" / "gpu.txt"
EXTRAS = ("gpu", "megatron", "smollm2", "wandb", "reasoning-gym")


def main() -> None:
    """Exit with a message unless the lock fits."""
    with tempfile.TemporaryDirectory() as folder:
        resolved = Path(folder, LOCK.name)
        if "--write" not in sys.argv:
            shutil.copy(LOCK, resolved)
        command = [Path(sys.executable).with_name("uv"), "pip", "compile", "pyproject.toml", "--output-file", resolved]
        command += ["--override", "requirements/gpu.in", *(f"--extra={extra}" for extra in EXTRAS)]
        command += ["--python-version", "3.12", "--python-platform", "x86_64-manylinux_2_31"]
        command += ["--system-certs", "--quiet", "--no-annotate", "--no-header"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if "Failed to fetch" in done.stderr:
            print(f"{LOCK.name} was not checked: no package index can be reached\n{done.stderr}")
            return
        if done.returncode:
            sys.exit(f"error: pyproject.toml and requirements/gpu.in cannot be resolved:\n{done.stderr}")
        if "--write" in sys.argv:
            shutil.copy(resolved, LOCK)
        elif resolved.read_text() != LOCK.read_text():
            sys.exit(f"error: {LOCK.name} does not fit pyproject.toml any more; resolve it anew: make lock")


if __name__ == "__main__":
    main()
