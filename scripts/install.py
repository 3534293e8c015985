"""Install rlloop for CPUs into .venv: the CPU build of torch, the lock, the wheel of this checkout.

    python3 scripts/install.py

A second call is instant: .venv/installed.json holds digests of what the install depends on, and only what changed is
done again: the wheel when a source changed, everything when the lock, torch or Python changed.

1. torch. `torch==2.13.0+cpu` is asked for by its full name, since plain `torch==2.13.0` is the CUDA build (2.5 GB) on
   most machines. pip looks first where it is configured to (some machines keep the CPU build), then in PyTorch's CPU
   index.
2. requirements/cpu.txt and megatron.txt, without dependency resolution: what their packages declare cannot all be
   installed on a CPU.
3. The wheel, built from a copy of the sources. Never an editable install: what runs here is what would be shipped.

Needs the standard library alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOCK = ROOT / "requirements" / "cpu.txt"
MEGATRON = ROOT / "requirements" / "megatron.txt"
LOG = VENV / "install.log"
DONE = VENV / "installed.json"
TORCH = "torch==2.13.0+cpu"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "rlloop", "algorithms", "envs")
MIN_PYTHON = (3, 11)
SECONDS_BETWEEN_LINES = 10.0

STARTED = time.monotonic()


class InstallError(Exception):
    """The install cannot go on; the message says why and what to do."""


def say(message: str) -> None:
    """One line of progress with the time since the start."""
    print(f"[{time.monotonic() - STARTED:4.0f} s] {message}", flush=True)


def check_machine() -> None:
    """Raise InstallError where the lock cannot be installed."""
    if sys.version_info < MIN_PYTHON:
        raise InstallError(
            f"expected Python >= 3.11, got {platform.python_version()} ({sys.executable}); "
            "name another: make PYTHON=python3.12 ..."
        )
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise InstallError(
            f"requirements/cpu.txt is for Linux on x86-64, this is {sys.platform} on {platform.machine()}; "
            "on another machine install vLLM yourself, then: pip install --no-deps ."
        )
    if shutil.which("cc") is None or not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise InstallError(
            "expected a C compiler and Python's headers, for pycosat (of reasoning-gym) comes as source only; "
            "on Debian: apt install build-essential python3-dev python3-venv"
        )


def source_files() -> list[Path]:
    """Every file that goes into the wheel."""
    files = [path for name in SOURCES for path in [ROOT / name, *sorted((ROOT / name).rglob("*"))] if path.is_file()]
    return [path for path in files if "__pycache__" not in path.parts]


def fingerprints() -> dict[str, str]:
    """Stage -> digest of all that it depends on."""
    dependencies = hashlib.sha256(
        f"{platform.python_version()} {TORCH}\n".encode() + LOCK.read_bytes() + MEGATRON.read_bytes()
    )
    wheel = dependencies.copy()
    for path in source_files():
        wheel.update(f"\0{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return {"dependencies": dependencies.hexdigest(), "wheel": wheel.hexdigest()}


def run(*command: str | Path, what: str, expected: int = 1) -> None:
    """Run a command with its output in the log, and a line now and then. Raises InstallError with the log's end."""
    fetched, said = 0, time.monotonic()
    with LOG.open("a") as log:
        log.write(f"\n$ {' '.join(map(str, command))}\n")
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=VENV, errors="replace"
        )
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            log.write(line)
            lines.append(line)
            if line.startswith("Installing collected packages"):
                say(f"  {what}: unpacking")
            elif line.startswith(("Collecting ", "Processing ")):
                fetched += 1
                if time.monotonic() - said > SECONDS_BETWEEN_LINES:
                    said = time.monotonic()
                    say(f"  {what}: {fetched} of {expected} found")
    if process.wait() != 0:
        raise InstallError(f"{what}: exit code {process.returncode}; the end of {LOG}:\n{''.join(lines[-15:])}")


def pip_install(*arguments: str | Path, what: str, expected: int = 1) -> None:
    """`pip install --no-deps` into .venv. Modules are compiled when they are first imported; most never are."""
    pip = (PYTHON, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--no-deps", "--no-compile")
    run(*pip, *arguments, what=what, expected=expected)


def create_venv() -> None:
    """Make .venv anew, with pip."""
    say(f"creating {VENV.relative_to(ROOT)} with Python {platform.python_version()}")
    subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], check=True)


def install_torch() -> None:
    """The CPU build, never the CUDA build."""
    say(f"installing {TORCH}")
    try:
        pip_install(TORCH, what=TORCH)
        say("  found by pip as it is configured here")
    except InstallError:
        say(f"  pip as it is configured here finds no CPU build; trying PyTorch's index {TORCH_CPU_INDEX}")
        pip_install("--index-url", TORCH_CPU_INDEX, TORCH, what=TORCH)
        say(f"  found in {TORCH_CPU_INDEX}")


def install_lock() -> None:
    """All other dependencies, as pinned."""
    expected = sum("==" in line for line in LOCK.read_text().splitlines())
    say(f"installing {expected} packages of {LOCK.relative_to(ROOT)}")
    pip_install("-r", LOCK, what=LOCK.name, expected=expected)
    pip_install("--ignore-requires-python", "-r", MEGATRON, what=MEGATRON.name)


def install_wheel() -> None:
    """A copy is built, so that neither build/ of an earlier one nor anything else in the checkout gets in."""
    say("building and installing the wheel of rlloop")
    with tempfile.TemporaryDirectory() as scratch:
        copy, wheels = Path(scratch, "source"), Path(scratch, "wheels")
        for path in source_files():
            target = copy / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
        run(PYTHON, "-m", "build", "--wheel", "--no-isolation", "--outdir", wheels, copy, what="wheel")
        pip_install("--force-reinstall", *wheels.glob("*.whl"), what="wheel")


def main() -> None:
    """Bring .venv up to date."""
    check_machine()
    wanted = fingerprints()
    done = json.loads(DONE.read_text()) if DONE.exists() else {}
    if done == wanted:
        return
    if done.get("dependencies") != wanted["dependencies"]:
        create_venv()
        install_torch()
        install_lock()
        DONE.write_text(json.dumps({"dependencies": wanted["dependencies"]}))
    install_wheel()
    DONE.write_text(json.dumps(wanted))
    say("installed")


if __name__ == "__main__":
    os.environ.pop("PYTHONPATH", None)
    try:
        main()
    except (InstallError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")
