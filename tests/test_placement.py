import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlloop.config import EngineSettings, RefitSettings, RunSettings, TrainerSettings, TrainingSettings
from rlloop.errors import ConfigError
from rlloop.placement import (
    Placement,
    check_transport,
    divide,
    fast_bfloat16,
    gpu_bytes,
    has_gpu,
    place,
    place_trainer,
    resolve_dtype,
    split_cores,
    split_gpus,
    visible_gpus,
)


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


def on_gpus(num_ranks: int = 1, **placement: Any) -> RunSettings:
    engine = {"kv_cache_gib": 1} if placement.get("engines_a_gpu", 1) > 1 else {}
    trainer = {"kind": "megatron", "megatron": {"data_parallel": num_ranks}} if num_ranks > 1 else {}
    return RunSettings(placement=placement, trainer=trainer, engine=engine)


def at_least(least: int, sizes: Sequence[int]) -> tuple[int, str]:
    """Stands for a model that needs so many GPUs."""
    return next(size for size in sizes if size >= least), "by size" if len(sizes) > 1 else ""


PLACEMENTS: list[tuple[int, int, int, dict[str, Any], str]] = [
    # GPUs, those that one engine needs, trainer ranks, settings
    (1, 1, 1, {}, "in bfloat16 on a GPU"),
    (1, 1, 1, {"colocate": True}, "in bfloat16 on a GPU"),
    (1, 1, 1, {"engine_gpus": "0", "trainer_gpus": "0"}, "in bfloat16 on a GPU"),
    (1, 1, 1, {"engines_a_gpu": 3}, "in bfloat16 on a GPU, 3 engines"),
    (4, 1, 1, {"engines_a_gpu": 2, "replicas": 2}, "4 engines on GPUs 0, 1, the trainer on GPU 2"),
    (2, 1, 1, {}, "1 engine on GPU 0, the trainer on GPU 1 (as many engines as there is room for)"),
    (4, 1, 1, {}, "3 engines on GPUs 0, 1, 2, the trainer on GPU 3 (by size; as many engines as there is room for)"),
    (4, 1, 2, {}, "2 engines on GPUs 0, 1, the trainer on GPUs 2, 3 (by size; as many"),
    (4, 2, 2, {}, "1 engine of 2 ranks on GPUs 0, 1, the trainer on GPUs 2, 3 (by size; as many"),
    (8, 4, 2, {}, "1 engine of 4 ranks on GPUs 0, 1, 2, 3, the trainer on GPUs 4, 5 (by size; as many"),
    (8, 2, 2, {}, "3 engines of 2 ranks each on GPUs 0, 1, 2, 3, 4, 5, the trainer on GPUs 6, 7 (by size; as many"),
    (8, 1, 2, {"replicas": 2}, "2 engines on GPUs 0, 1, the trainer on GPUs 2, 3 (by size)"),
    (8, 1, 1, {"replicas": 4, "tensor_parallel": 1}, "4 engines on GPUs 0, 1, 2, 3, the trainer on GPU 4"),
    (4, 1, 2, {"tensor_parallel": 2}, "1 engine of 2 ranks on GPUs 0, 1, the trainer on GPUs 2, 3 (as many engines as"),
    (4, 1, 1, {"colocate": True}, "4 engines on GPUs 0, 1, 2, 3, the trainer on GPU 0 (by size; as many"),
    (
        4,
        2,
        4,
        {"colocate": True},
        "2 engines of 2 ranks each on GPUs 0, 1, 2, 3, the trainer on GPUs 0, 1, 2, 3 (by size;",
    ),
    (2, 1, 2, {"colocate": True, "replicas": 1}, "1 engine on GPU 0, the trainer on GPUs 0, 1 (by size)"),
    (4, 1, 2, {"colocate": True, "engine_gpus": "2"}, "1 engine on GPU 2, the trainer on GPUs 0, 2"),
    (
        4,
        1,
        1,
        {"colocate": True, "trainer_gpus": "3", "replicas": 4},
        "4 engines on GPUs 0, 1, 2, 3, the trainer on GPU 3",
    ),
    (
        4,
        1,
        2,
        {"engine_gpus": "2-3", "trainer_gpus": "0,1"},
        "2 engines on GPUs 2, 3, the trainer on GPUs 0, 1 (by size)",
    ),
    (4, 2, 2, {"engine_gpus": "2,3"}, "1 engine of 2 ranks on GPUs 2, 3, the trainer on GPUs 0, 1 (by size)"),
    (4, 1, 1, {"engine_gpus": "1,3", "replicas": 1}, "1 engine of 2 ranks on GPUs 1, 3, the trainer on GPU 0"),
    (4, 1, 1, {"trainer_gpus": "1"}, "3 engines on GPUs 0, 2, 3, the trainer on GPU 1 (by size; as many"),
    (4, 2, 1, {"engine_gpus": "0-2"}, "1 engine of 3 ranks on GPUs 0, 1, 2, the trainer on GPU 3 (by size)"),
]


@pytest.mark.parametrize(("num_gpus", "needs", "num_ranks", "wanted", "expected"), PLACEMENTS)
def test_split_gpus(num_gpus: int, needs: int, num_ranks: int, wanted: dict[str, Any], expected: str) -> None:
    found = split_gpus(on_gpus(num_ranks, **wanted), "bfloat16", num_gpus, lambda sizes: at_least(needs, sizes))
    assert str(found).removeprefix("in bfloat16, ").startswith(expected)
    assert (found.engine_cores, found.trainer_cores) == (None, None)


IMPOSSIBLE: list[tuple[int, int, dict[str, Any], str]] = [
    (
        2,
        2,
        {},
        "expected 3 GPUs, 1 for engines and 2 for the trainer, found 2; ask for fewer, or .*--placement.colocate",
    ),
    (1, 2, {}, "expected 2 GPUs, 1 for engines and 2 for the trainer, found 1; ask for fewer$"),
    (1, 1, {"replicas": 2}, "expected 2 GPUs, 2 for engines and 1 for the trainer, found 1"),
    (4, 1, {"replicas": 2, "tensor_parallel": 2}, "expected 5 GPUs, 4 for engines and 1 for the trainer, found 4"),
    (4, 1, {"colocate": True, "tensor_parallel": 8}, "expected 8 GPUs, 8 for engines and 1 for the trainer, found 4"),
    (
        4,
        1,
        {"tensor_parallel": 2, "engines_a_gpu": 2},
        "--placement.engines-a-gpu 2: expected engines of one GPU, got some of 2",
    ),
    (2, 1, {"engine_gpus": "0,1"}, "expected 3 GPUs, 2 for engines"),
    (2, 1, {"engine_gpus": "2"}, r"--placement.engine-gpus: expected GPUs among \[0, 1\], the process's own, got '2'"),
    (2, 1, {"trainer_gpus": "x"}, "--placement.trainer-gpus: expected auto or a list of GPUs such as 0-3,6, got 'x'"),
    (
        4,
        2,
        {"trainer_gpus": "3"},
        r"--placement.trainer-gpus: expected 2, one for each rank .*, got '3'; see --trainer.meg",
    ),
    (4, 1, {"trainer_gpus": "2,3"}, "--placement.trainer-gpus: expected 1, one for each rank"),
    (
        4,
        1,
        {"engine_gpus": "0-1", "trainer_gpus": "1"},
        "expected others than .*'0-1', got '1'; let .*--placement.colocate",
    ),
    (
        8,
        1,
        {"engine_gpus": "0-2", "replicas": 2},
        "expected replicas x tensor-parallel .*, 2 x any, got '0-2', which are 3",
    ),
    (8, 1, {"engine_gpus": "0-2", "tensor_parallel": 2}, "any x 2, got '0-2', which are 3"),
    (8, 1, {"engine_gpus": "0-3", "replicas": 1, "tensor_parallel": 2}, "1 x 2, got '0-3', which are 4"),
]


@pytest.mark.parametrize(("num_gpus", "num_ranks", "wanted", "message"), IMPOSSIBLE)
def test_what_the_gpus_cannot_do_is_refused(
    num_gpus: int, num_ranks: int, wanted: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        split_gpus(on_gpus(num_ranks, **wanted), "bfloat16", num_gpus, lambda sizes: at_least(1, sizes))


@pytest.mark.parametrize("number", range(2, 9))
def test_engines_on_one_gpu_need_memory_each(number: int) -> None:
    def place(share: float) -> Placement:
        settings = RunSettings(placement={"engines_a_gpu": number}, engine={"gpu_memory_utilization": share})
        return split_gpus(settings, "bfloat16", 1, lambda sizes: (1, ""))

    with pytest.raises(
        ConfigError, match=r"got --engine.gpu-memory-utilization 0.9; set at most 0\.\d\d, or"
    ) as refused:
        place(0.9)
    advice = float(str(refused.value).split("at most ")[1].split(",")[0])
    assert place(advice).engine_gpus == (0,) * number
    with pytest.raises(ConfigError):
        place(advice + 0.01)


@pytest.mark.parametrize(("engine_gpus", "trainer_gpus"), [((0, 1), (1,)), ((0, 0), (1, 2))])
def test_nccl_wants_a_gpu_for_each_rank(engine_gpus: tuple[int, ...], trainer_gpus: tuple[int, ...]) -> None:
    placement = Placement("bfloat16", None, None, engine_gpus=engine_gpus, replicas=2, trainer_gpus=trainer_gpus)
    with pytest.raises(ConfigError, match=r"expected a GPU for each rank .*, got [01], "):
        check_transport(RunSettings(refit={"transport": "broadcast"}), placement)
    check_transport(RunSettings(), placement)


def lists(num_gpus: int) -> st.SearchStrategy[str]:
    gpus = st.lists(st.integers(0, num_gpus - 1), min_size=1, unique=True).map(lambda found: ",".join(map(str, found)))
    return st.one_of(st.just("auto"), gpus)


@given(
    num_gpus=st.shared(st.integers(1, 6), key="gpus"),
    num_ranks=st.integers(1, 4),
    needs=st.integers(1, 3),
    replicas=st.none() | st.integers(1, 4),
    tensor_parallel=st.none() | st.integers(1, 3),
    colocate=st.booleans(),
    engines_a_gpu=st.integers(1, 2),
    engine_gpus=st.shared(st.integers(1, 6), key="gpus").flatmap(lists),
    trainer_gpus=st.shared(st.integers(1, 6), key="gpus").flatmap(lists),
)
def test_a_placement_is_possible_and_as_asked(num_gpus: int, num_ranks: int, needs: int, **wanted: Any) -> None:
    def fit(sizes: Sequence[int]) -> tuple[int, str]:
        assert list(sizes) == sorted(set(sizes))
        return min((size for size in sizes if size >= needs), default=sizes[-1]), ""

    try:
        found = split_gpus(on_gpus(num_ranks, **wanted), "bfloat16", num_gpus, fit)
    except ConfigError:
        return
    engine, trainer = found.engine_gpus, found.trainer_gpus
    assert {*engine, *trainer} <= set(range(num_gpus))
    assert len({*engine}) * wanted["engines_a_gpu"] == len(engine) == found.replicas * found.tensor_parallel
    assert len({*trainer}) == len(trainer) == num_ranks
    assert wanted["colocate"] or num_gpus == 1 or not {*engine} & {*trainer}
    assert found.replicas == (wanted["replicas"] or len({*engine}) // found.tensor_parallel) * wanted["engines_a_gpu"]
    assert found.tensor_parallel == (wanted["tensor_parallel"] or found.tensor_parallel)
    for asked, got in ((wanted["engine_gpus"], engine), (wanted["trainer_gpus"], trainer)):
        assert asked == "auto" or {*map(int, asked.split(","))} == {*got}
    assert sum((found.gpus_of(replica) for replica in range(found.replicas)), ()) == engine


def model_folder(folder: Path, num_gigabytes: float, heads: int = 8, key_value_heads: int = 2) -> str:
    config = {"num_attention_heads": heads, "num_key_value_heads": key_value_heads, "intermediate_size": 4096}
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    for part in range(2):
        with (folder / f"model-{part}.safetensors").open("wb") as file:
            file.truncate(int(num_gigabytes * 1e9) // 2)  # takes no room
    return str(folder)


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlloop.placement.visible_gpus", lambda: ["0", "1", "2", "3"])
    monkeypatch.setattr("rlloop.placement.gpu_bytes", lambda: 80 * 10**9)


@pytest.mark.parametrize(
    ("num_gigabytes", "expected"),
    [
        (
            16,
            "in bfloat16, 3 engines on GPUs 0, 1, 2, the trainer on GPU 3 (8.0 GB of weights, of a GPU 36.0 GB at most;",
        ),
        (71, "in bfloat16, 3 engines on GPUs 0, 1, 2"),
        (73, "in bfloat16, 1 engine of 2 ranks on GPUs 0, 1, the trainer on GPU 2 (36.5 GB of weights, "),
    ],
)
@pytest.mark.usefixtures("four_gpus")
def test_an_engine_gets_as_many_gpus_as_its_weights_need(tmp_path: Path, num_gigabytes: float, expected: str) -> None:
    assert str(place(RunSettings(model=model_folder(tmp_path, num_gigabytes)))).startswith(expected)


@pytest.mark.parametrize(
    ("placement", "engine", "expected"),
    [
        ({}, {}, None),
        ({"colocate": True}, {}, 14),  # 80 GB x 0.4 / 2
        ({"engines_a_gpu": 2}, {}, 16),  # 80 GB x 0.9 / 2 / 2
        ({"colocate": True, "engines_a_gpu": 2}, {}, 7),
        ({"colocate": True, "engine_gpus": "0", "trainer_gpus": "1"}, {}, None),
        ({"colocate": True}, {"gpu_memory_utilization": 0.5}, 18),  # 80 GB x 0.5 / 2
        ({"engines_a_gpu": 2}, {"gpu_memory_utilization": 0.45}, 16),  # 80 GB x 0.45 / 2
        ({"colocate": True}, {"kv_cache_gib": 3}, None),
    ],
)
@pytest.mark.usefixtures("four_gpus")
def test_engines_that_share_a_gpu_have_a_cache_of_a_fixed_size(
    placement: dict[str, Any], engine: dict[str, Any], expected: int | None, tmp_path: Path
) -> None:
    settings = RunSettings(model=model_folder(tmp_path, 1), placement=placement, engine=engine)
    assert place(settings).kv_cache_gib == expected


@pytest.mark.parametrize(
    ("placement", "num_gigabytes", "expected"),
    [({"engines_a_gpu": 3}, 16, 9), ({"engines_a_gpu": 2}, 20, 6), ({"colocate": True}, 20, 4)],
)
@pytest.mark.usefixtures("four_gpus")
def test_beside_a_cache_of_a_given_size_weights_have_the_rest(
    placement: dict[str, Any], num_gigabytes: float, expected: int, tmp_path: Path
) -> None:
    model = model_folder(tmp_path, num_gigabytes)
    found = place(RunSettings(model=model, placement=placement, engine={"kv_cache_gib": 8}))
    assert (found.replicas, found.tensor_parallel) == (expected, 1)


@pytest.mark.parametrize("part", ["engine", "trainer"])
@pytest.mark.usefixtures("four_gpus")
def test_cores_are_refused_where_there_are_gpus(part: str) -> None:
    with pytest.raises(ConfigError, match=f"--{part}.cpu-cores: expected no GPU"):
        place(RunSettings(**{part: {"cpu_cores": "0"}}))
    with pytest.raises(ConfigError, match=r"--trainer.cpu-cores: expected no GPU"):
        place_trainer(TrainingSettings(trainer={"cpu_cores": "0"}))


@pytest.mark.usefixtures("four_gpus")
def test_weights_that_are_merged_are_there_twice(tmp_path: Path) -> None:
    settings = RunSettings(model=model_folder(tmp_path, 40), refit=RefitSettings(form="merged"))
    assert str(place(settings)).startswith("in bfloat16, 1 engine of 2 ranks on GPUs 0, 1")


@pytest.mark.usefixtures("four_gpus")
def test_a_model_that_the_gpus_cannot_hold_or_share_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"expected GPUs for 80.0 GB of weights .*, found 2 x 36.0 GB beside .*tensor-parallel"
    ):
        place(RunSettings(model=model_folder(tmp_path, 160)))
    for heads, key_value_heads, what in ((9, 3, "9 attention heads"), (6, 3, "3 key-value heads")):
        model = model_folder(tmp_path, 1, heads, key_value_heads)
        with pytest.raises(
            ConfigError, match=f"--placement.tensor-parallel 2: expected a divisor of the model's {what}"
        ):
            place(RunSettings(model=model, placement={"tensor_parallel": 2}))
        assert place(RunSettings(model=model)).replicas == 3
    few = model_folder(tmp_path, 1, 8, 1)
    assert place(RunSettings(model=few, placement={"tensor_parallel": 2})).replicas == 1


@pytest.mark.parametrize(
    ("settings", "num_gigabytes", "needed"),
    [
        ({}, 40, None),  # 40 + 40 GB, and a cache of 14 GiB
        (
            {},
            66,
            r"81\.0 GB .1 x 33\.0 GB of weights and 14 GiB of KV cache in engines, 33\.0 GB of weights in the trainer",
        ),
        ({"refit": {"form": "merged"}}, 40, None),
        ({"refit": {"form": "merged"}}, 46, r"84\.0 GB"),  # 2 x 23 + 15 + 23
        ({"placement": {"engines_a_gpu": 2}}, 48, r"87\.0 GB"),  # 2 x (24 + 7.5) + 24
        ({"engine": {"kv_cache_gib": 70}}, 2, None),
        ({"engine": {"kv_cache_gib": 75}}, 2, r"82\.5 GB"),
        ({"engine": {"kv_cache_gib": 75}, "placement": {"tensor_parallel": 1}}, 2, None),
    ],
)
def test_one_gpu_must_hold_weights_and_caches(
    settings: dict[str, Any], num_gigabytes: float, needed: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlloop.placement.visible_gpus", lambda: ["0"])
    monkeypatch.setattr("rlloop.placement.gpu_bytes", lambda: 80 * 10**9)
    run = RunSettings(model=model_folder(tmp_path, num_gigabytes), **settings)
    if needed is None:
        assert place(run).engine_gpus == (0,)
    else:
        with pytest.raises(ConfigError, match=f"--placement: expected a GPU with more than {needed}"):
            place(run)


@pytest.mark.parametrize(
    ("num_gpus", "engine", "needed"),
    [
        (2, {}, r"85\.0 GB \(1 x 85\.0 GB of weights in engines\), found 80\.0 GB"),
        (3, {"kv_cache_gib": 1}, r"85\.0 GB \(85\.0 GB of weights in the trainer\), found 80\.0 GB"),
    ],
)
def test_a_gpu_of_engines_or_trainer_alone_must_hold_the_weights(
    num_gpus: int, engine: dict[str, Any], needed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three, two GPUs hold one engine, and the third one cannot hold the trainer."""
    monkeypatch.setattr("rlloop.placement.visible_gpus", lambda: list("012")[:num_gpus])
    monkeypatch.setattr("rlloop.placement.gpu_bytes", lambda: 80 * 10**9)
    with pytest.raises(ConfigError, match=f"--placement: expected a GPU with more than {needed}"):
        place(RunSettings(model=model_folder(tmp_path, 170), engine=engine))


@pytest.mark.parametrize(("trainer_gpus", "expected"), [("auto", 1), ("2", 2)])
@pytest.mark.usefixtures("four_gpus")
def test_engines_that_could_share_gpus_and_do_not_have_the_memory_that_they_start_with(
    trainer_gpus: str, expected: int, tmp_path: Path
) -> None:
    """20 GB of weights are more than half of 0.4 of a GPU, and less than half of 0.9."""
    wanted = {"colocate": True, "engine_gpus": "0-1", "trainer_gpus": trainer_gpus}
    assert place(RunSettings(model=model_folder(tmp_path, 40), placement=wanted)).replicas == expected


def test_cuda_ipc_is_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlloop.placement.visible_gpus", list)
    with pytest.raises(ConfigError, match=r"--refit.transport cuda_ipc: expected GPUs, found none"):
        place(RunSettings(refit={"transport": "cuda_ipc"}))


@pytest.mark.usefixtures("four_gpus")
def test_a_trainer_without_an_engine_has_the_first_gpus() -> None:
    trainer = {"kind": "megatron", "megatron": {"data_parallel": 2}}
    assert str(place_trainer(TrainingSettings(trainer=trainer))) == "in bfloat16 on GPUs 0, 1"
    assert place_trainer(TrainingSettings()).trainer_gpus == (0,)
    trainer["megatron"] = {"data_parallel": 5}
    with pytest.raises(ConfigError, match=r"--trainer.megatron: expected 5 GPUs, one a rank, found 4"):
        place_trainer(TrainingSettings(trainer=trainer))


@pytest.mark.parametrize(
    ("num_found", "variable", "expected"),
    [
        (0, None, []),
        (0, "0", []),
        (2, None, ["0", "1"]),
        (2, "1", ["1"]),
        (2, "1, 0", ["1", "0"]),
        (2, "GPU-ab,GPU-cd", ["GPU-ab", "GPU-cd"]),
        (2, "", []),
        (2, "0,-1,1", ["0"]),
        (2, "1,7,0", ["1"]),
        (2, "2", []),
    ],
)
def test_visible_gpus(
    monkeypatch: pytest.MonkeyPatch, num_found: int, variable: str | None, expected: list[str]
) -> None:
    monkeypatch.setattr(
        Path, "glob", lambda self, pattern: [Path(f"/dev/nvidia{index + 4}") for index in range(num_found)]
    )
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert visible_gpus() == expected
    assert has_gpu() == bool(expected)


def test_gpu_bytes_are_those_of_the_smallest_visible_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    program = tmp_path / "nvidia-smi"
    program.touch(0o755)
    program.write_text("#!/bin/sh\n[ $1 = --id=5,GPU-ab ] && printf '81559\\n40960\\n'\n")
    monkeypatch.setattr("rlloop.placement.visible_gpus", lambda: ["5", "GPU-ab"])
    gpu_bytes.cache_clear()
    assert gpu_bytes() == 40 << 30
    program.write_text("#!/bin/sh\nexit 9\n")
    assert gpu_bytes() == 40 << 30, "asked once"
    gpu_bytes.cache_clear()
    with pytest.raises(ConfigError, match=r"expected nvidia-smi to say .*status 9.*--placement.tensor-parallel"):
        gpu_bytes()
    assert place(RunSettings(model=model_folder(tmp_path, 170))).replicas == 1, "who needs no size is not refused"


@pytest.mark.parametrize(
    "wanted", [{"colocate": True}, {"engine_gpus": "0"}, {"trainer_gpus": "0"}], ids=lambda wanted: next(iter(wanted))
)
def test_gpus_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch, wanted: dict[str, Any]) -> None:
    monkeypatch.setattr("rlloop.placement.visible_gpus", list)
    flag = next(iter(wanted)).replace("_", "-")
    with pytest.raises(
        ConfigError, match=f"--placement.{flag}: expected GPUs, found none; on a CPU set --engine.cpu-cores"
    ):
        place(on_gpus(**wanted))


def test_engines_on_a_cpu_share_its_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("rlloop.placement.visible_gpus", list)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    wanted = RunSettings(
        model=model_folder(tmp_path, 0.1),
        dtype="float32",
        placement={"replicas": 2, "tensor_parallel": 2},
    )
    found = place(wanted)
    assert str(found) == "in float32 on cores [0, 1, 2, 3] and [4, 5, 6, 7], 2 engines of 2 ranks each"
    assert [found.cores_of(replica) for replica in range(2)] == [{0, 2}, {1, 3}]
    assert str(place(RunSettings(dtype="float32"))) == "in float32 on cores [0, 1, 2, 3] and [4, 5, 6, 7]"


@given(st.none() | st.frozensets(st.integers(0, 9), min_size=1), st.integers(1, 6))
def test_divide(cores: frozenset[int] | None, num_parts: int) -> None:
    parts = divide(cores, num_parts)
    assert len(parts) == num_parts
    if cores is None:
        assert set(parts) == {None}
    else:
        assert frozenset().union(*(part or () for part in parts)) == cores
        assert all(parts)
        assert len(cores) < num_parts or sum(len(part or ()) for part in parts) == len(cores)


def test_a_placement_on_one_gpu_gives_the_engine_that_one() -> None:
    assert Placement("bfloat16", None, None, engine_gpus=(0,), trainer_gpus=(0,)).gpus_of(0) == (0,)


@pytest.mark.parametrize(
    ("placement", "megatron", "is_refused"),
    [
        ({}, {"pipeline_parallel": 2}, False),  # 33 + 15 + 33 / 2 GB
        ({}, {"data_parallel": 2}, True),  # 33 + 15 + 33 GB
        ({"engine_gpus": "1"}, {"data_parallel": 2}, True),  # beside the trainer's second rank
    ],
)
def test_a_gpu_must_hold_the_share_of_the_rank_that_is_on_it(
    placement: dict[str, Any],
    megatron: dict[str, int],
    is_refused: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rlloop.placement.visible_gpus", lambda: ["0", "1"])
    monkeypatch.setattr("rlloop.placement.gpu_bytes", lambda: 80 * 10**9)
    run = RunSettings(
        model=model_folder(tmp_path, 66),
        placement={"colocate": True, **placement},
        trainer={"kind": "megatron", "megatron": megatron},
        engine={"kv_cache_gib": 14},
    )
    with pytest.raises(ConfigError, match=r"more than 81\.0 GB") if is_refused else nullcontext():
        assert place(run).trainer_gpus == (0, 1)


def test_the_trainers_gpus_are_named_as_this_process_sees_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlloop.placement.visible_gpus", lambda: ["2", "GPU-ab", "5"])
    placement = Placement("bfloat16", None, None, engine_gpus=(0,), trainer_gpus=(1, 2))
    assert placement.trainer_devices == "GPU-ab,5"
    assert Placement("float32", frozenset({0}), frozenset({1})).trainer_devices is None
