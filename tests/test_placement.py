import os
from pathlib import Path

import pytest

from rlloop.config import EngineSettings, RunSettings, TrainerSettings, TrainingSettings
from rlloop.errors import ConfigError
from rlloop.placement import fast_bfloat16, has_gpu, place_trainer, resolve_dtype, split_cores


def settings(engine: str = "auto", trainer: str = "auto", max_staleness: int = 2) -> RunSettings:
    return RunSettings(
        max_staleness=max_staleness,
        engine=EngineSettings(cpu_cores=engine),
        trainer=TrainerSettings(cpu_cores=trainer),
    )


@pytest.mark.parametrize(
    ("engine", "trainer", "max_staleness", "available", "expected"),
    [
        ("auto", "auto", 2, {0, 1}, ({0}, {1})),
        ("auto", "auto", 2, {0, 1, 2, 3, 4}, ({0, 1}, {2, 3, 4})),
        ("auto", "auto", 2, {5, 7, 9, 11}, ({5, 7}, {9, 11})),
        ("auto", "auto", 2, {3}, ({3}, {3})),
        ("auto", "auto", 0, {0, 1}, ({0, 1}, {0, 1})),
        ("0", "auto", 0, {0, 1}, ({0}, {0, 1})),
        ("0-2,6", "4", 1, set(range(8)), ({0, 1, 2, 6}, {4})),
        ("3", "auto", 1, {0, 1, 2, 3}, ({3}, {0, 1, 2})),
        ("auto", "0", 1, {0, 1, 2, 3}, ({1, 2, 3}, {0})),
        ("auto", "0-1", 1, {0, 1}, ({0, 1}, {0, 1})),
        ("0,1", "auto", 1, {0, 1}, ({0, 1}, {0, 1})),
    ],
)
def test_split_cores(
    engine: str, trainer: str, max_staleness: int, available: set[int], expected: tuple[set[int], set[int]]
) -> None:
    cores = split_cores(settings(engine, trainer, max_staleness), available)
    assert tuple(map(set, cores)) == expected


def test_this_machine_can_run_what_is_split() -> None:
    engine, trainer = split_cores(settings(), os.sched_getaffinity(0))
    assert engine
    assert trainer
    assert engine | trainer <= os.sched_getaffinity(0)


@pytest.mark.skipif(has_gpu(), reason="a GPU's trainer has no cores")
def test_a_trainer_without_an_engine_has_all_cores() -> None:
    available = os.sched_getaffinity(0)
    alone = place_trainer(TrainingSettings(dtype="float32"))
    assert (alone.engine_cores, alone.trainer_cores) == (frozenset(), available)
    assert str(alone) == f"in float32 on cores {sorted(available)}"
    first = min(available)
    assert place_trainer(TrainingSettings(trainer=TrainerSettings(cpu_cores=str(first)))).trainer_cores == {first}


@pytest.mark.parametrize("cores", ["", "a", "0-", "-1", "0,,1", "0;1", "1-0", "0-2", "9"])
@pytest.mark.parametrize("side", ["engine", "trainer"])
def test_bad_cores_name_the_flag_and_the_value(side: str, cores: str) -> None:
    bad = settings(engine=cores) if side == "engine" else settings(trainer=cores)
    with pytest.raises(ConfigError) as error:
        split_cores(bad, {0, 1})
    assert str(error.value).startswith(f"--{side}.cpu-cores: expected ")
    assert repr(cores) in str(error.value)


def test_dtype_of_the_settings_wins() -> None:
    assert resolve_dtype(RunSettings(dtype="float32")) == "float32"
    assert resolve_dtype(RunSettings(dtype="bfloat16")) == "bfloat16"


@pytest.mark.parametrize(("gpu", "fast", "expected"), [(0, 0, "float32"), (0, 1, "bfloat16"), (1, 0, "bfloat16")])
def test_auto_dtype(monkeypatch: pytest.MonkeyPatch, gpu: int, fast: int, expected: str) -> None:
    monkeypatch.setattr("rlloop.placement.has_gpu", lambda: bool(gpu))
    monkeypatch.setattr("rlloop.placement.fast_bfloat16", lambda: bool(fast))
    assert resolve_dtype(RunSettings()) == expected


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16 sse\nbugs\t: amx_bf16\n", True),
        ("processor\t: 0\nflags\t\t: fpu amx_bf16\n", True),
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16x\nbugs\t: avx512_bf16\n", False),
        ("processor\t: 0\n", False),
    ],
)
def test_fast_bfloat16(monkeypatch: pytest.MonkeyPatch, cpuinfo: str, expected: bool) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: cpuinfo)
    assert fast_bfloat16() is expected
