"""What a benchmark prints, kept: benchmarks/results/<name>.txt as printed, <name>.json with the same numbers unrounded."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

import psutil

RESULTS = Path(__file__).parent / "results"

Cell: TypeAlias = str | int | float | None


class Report:
    """Prints tables and lines as they come; `write` keeps them, with the command, the machine and the versions.

    `name` is that of the script; `packages` are the distributions whose versions matter to the numbers.
    """

    def __init__(self, name: str, packages: Sequence[str] = ()) -> None:
        self._name = name
        self._lines: list[str] = []
        self._tables: dict[str, list[dict[str, Cell]]] = {}
        self._facts: dict[str, str] = {
            "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
            "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            "machine": _machine(),
            "code": _code(),
            "versions": ", ".join([f"Python {platform.python_version()}", *_versions(["rlloop", *packages])]),
            "load at the start": _load(),
        }
        for fact, value in self._facts.items():
            self.line(f"{fact}: {value}")

    @property
    def facts(self) -> dict[str, str]:
        """Command, date, machine, versions, load."""
        return dict(self._facts)

    def line(self, text: str = "") -> None:
        """Print one line."""
        print(text, flush=True)
        self._lines.append(text)

    def origins(self, runs: Sequence[Mapping[str, Any]]) -> None:
        """Where and with what kept runs were made: the header is of the process that sums them up."""
        self.line()
        for machine, versions in dict.fromkeys((run["machine"], run["versions"]) for run in runs):
            of_one = [run for run in runs if (run["machine"], run["versions"]) == (machine, versions)]
            dates = sorted(run["date"] for run in of_one)
            self.line(f"{len(of_one)} runs of scripts started {dates[0]} to {dates[-1]}: {machine}; {versions}")
            for command in sorted({run["command"] for run in of_one}):
                self.line(f"  {command}")

    def table(self, title: str, rows: Sequence[Mapping[str, Cell]], formats: Mapping[str, str] | None = None) -> None:
        """Print rows, whose keys are the columns' titles.

        `formats` maps titles to what str.format takes; without one, floats have three digits. None is a dash.
        """
        formats = formats or {}
        self._tables[title] = [dict(row) for row in rows]
        cells = [list(rows[0]), *([_show(row[column], formats.get(column)) for column in rows[0]] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
        lines.insert(1, "  ".join("-" * width for width in widths))
        for text in ("", title, *lines):
            self.line(text)

    def write(self) -> None:
        """Replace the results of the last run."""
        self._facts["load at the end"] = _load()
        self.line()
        self.line(f"load at the end: {self._facts['load at the end']}")
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{self._name}.txt").write_text("\n".join(self._lines) + "\n")
        everything = {**self._facts, "tables": self._tables}
        (RESULTS / f"{self._name}.json").write_text(json.dumps(everything, indent=1) + "\n")


def _show(cell: Cell, template: str | None) -> str:
    if cell is None:
        return "-"
    if template:
        return template.format(cell)
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.3g}"
    return f"{cell:,}" if isinstance(cell, int) else cell


def _code() -> str:
    """The commit of the checkout that holds this file, and whether more than results was changed since."""

    def git(*arguments: str) -> str:
        root = Path(__file__).parent.parent
        return subprocess.run(
            ["git", "-C", root, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + (", changed" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "no git checkout"


def _machine() -> str:
    cpu = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    memory = psutil.virtual_memory().total / 2**30
    gpus = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    models = [
        line.partition(":")[2].strip() for gpu in gpus for line in gpu.read_text().splitlines() if "Model:" in line
    ]
    machine = [cpu, f"{len(os.sched_getaffinity(0))} cores", f"{memory:.0f} GiB", *models, platform.system()]
    return ", ".join(machine)


def _versions(packages: Sequence[str]) -> list[str]:
    found = []
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} not installed")
    return found


def _load() -> str:
    """Runnable processes, averaged: above the number of cores, wall clock times mean little."""
    return " / ".join(f"{load:.1f}" for load in os.getloadavg()) + " (1 / 5 / 15 min)"
