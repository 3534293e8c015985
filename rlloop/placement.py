"""Where engine and trainer compute, and in which number format."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlloop.config import RunSettings, TrainingSettings
from rlloop.errors import ConfigError

_CORE_LIST = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")


@dataclass(frozen=True, slots=True)
class Placement:
    """`None` for cores means a GPU, and no cores that there is no engine."""

    dtype: Literal["bfloat16", "float32"]
    engine_cores: frozenset[int] | None
    trainer_cores: frozenset[int] | None

    def __str__(self) -> str:
        if self.engine_cores is None or self.trainer_cores is None:
            return f"in {self.dtype} on a GPU"
        cores = [str(sorted(own)) for own in (self.engine_cores, self.trainer_cores) if own]
        return f"in {self.dtype} on cores {' and '.join(cores)}"


def place(settings: RunSettings) -> Placement:
    """What this machine offers to this run. Raises ConfigError as `split_cores` does."""
    cores = (None, None) if has_gpu() else split_cores(settings, os.sched_getaffinity(0))
    return Placement(resolve_dtype(settings), *cores)


def place_trainer(settings: TrainingSettings) -> Placement:
    """What this machine offers to a trainer without an engine: all cores, unless the settings say which. Raises ConfigError as
    `split_cores` does."""
    if has_gpu():
        return Placement(resolve_dtype(settings), None, None)
    available = os.sched_getaffinity(0)
    cores = _explicit(settings.trainer.cpu_cores, "--trainer.cpu-cores", available) or frozenset(available)
    return Placement(resolve_dtype(settings), frozenset(), cores)


def split_cores(settings: RunSettings, available: set[int]) -> tuple[frozenset[int], frozenset[int]]:
    """Cores of (engine, trainer) on a CPU; `available` is os.sched_getaffinity(0).

    `auto` is half each, since they compute at the same time and threads of both on one core slow each other down; a
    single core is shared. With max_staleness 0 they take turns, so both get all cores. Beside explicit cores, `auto` is
    the rest.

    Raises ConfigError for a list that is malformed or names a core that is not available.
    """
    engine = _explicit(settings.engine.cpu_cores, "--engine.cpu-cores", available)
    trainer = _explicit(settings.trainer.cpu_cores, "--trainer.cpu-cores", available)
    every = frozenset(available)
    if settings.max_staleness == 0:
        return engine or every, trainer or every
    if engine is None:
        half = frozenset(sorted(available)[: max(1, len(available) // 2)])
        engine = (every - trainer if trainer else half) or every
    return engine, trainer or (every - engine) or every


def _explicit(cores: str, flag: str, available: set[int]) -> frozenset[int] | None:
    """`0-3,6` -> {0, 1, 2, 3, 6}; None for `auto`."""
    if cores == "auto":
        return None
    if not _CORE_LIST.fullmatch(cores):
        raise ConfigError(f"{flag}: expected auto or a list of cores such as 0-3,6, got {cores!r}")
    chosen: set[int] = set()
    for part in cores.split(","):
        first, _, last = part.partition("-")
        span = range(int(first), int(last or first) + 1)
        if not available.issuperset(span) or not span:
            raise ConfigError(f"{flag}: expected cores among {sorted(available)}, the process's own, got {cores!r}")
        chosen.update(span)
    return frozenset(chosen)


def has_gpu() -> bool:
    """Whether the machine shows an NVIDIA GPU. Asks the device files, for torch would take seconds to import."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def fast_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware (about twice as fast as float32)."""
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return flags is not None and not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags[1].split())


def resolve_dtype(settings: TrainingSettings) -> Literal["bfloat16", "float32"]:
    """`auto` becomes bfloat16 on a GPU and on processors that are fast at it, else float32."""
    if settings.dtype != "auto":
        return settings.dtype
    return "bfloat16" if has_gpu() or fast_bfloat16() else "float32"
