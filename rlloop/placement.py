"""Where engines and trainer compute, and in which number format."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import takewhile
from pathlib import Path
from typing import Literal, TypeAlias

from rlloop.config import RunSettings, TrainingSettings
from rlloop.errors import ConfigError
from rlloop.models import cannot_be_shared, resolve_model, weight_bytes

Dtype: TypeAlias = Literal["bfloat16", "float32"]

MEMORY_SHARE = 0.9
"""Of a GPU's memory that one engine takes where it is alone."""
_LIST = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")


@dataclass(frozen=True, slots=True)
class Placement:
    """`None` for cores means GPUs, and no cores that there is no engine."""

    dtype: Dtype
    engine_cores: frozenset[int] | None
    trainer_cores: frozenset[int] | None
    replicas: int = 1
    """Engines."""
    tensor_parallel: int = 1
    """GPUs, or processes on a CPU, of each engine."""
    engine_gpus: tuple[int, ...] = ()
    """One engine's after the other's, which may be the same; like the trainer's, they count those that this process sees."""
    trainer_gpus: tuple[int, ...] = ()
    """One for each rank."""
    reason: str = ""
    """Why so, where it was not told."""
    kv_cache_gib: int | None = None
    """Of every engine, where some share a GPU; None: of the size that the settings say, or vLLM finds room for."""

    def __str__(self) -> str:
        engines = f"{self.replicas} engines" if self.replicas > 1 else "1 engine"
        if self.tensor_parallel > 1:
            engines += f" of {self.tensor_parallel} ranks" + (" each" if self.replicas > 1 else "")
        if self.engine_cores is not None and self.trainer_cores is not None:
            cores = [str(sorted(own)) for own in (self.engine_cores, self.trainer_cores) if own]
            is_plain = self.replicas == self.tensor_parallel == 1
            return f"in {self.dtype} on cores {' and '.join(cores)}" + ("" if is_plain else f", {engines}")
        if len({*self.engine_gpus, *self.trainer_gpus}) <= 1:
            return f"in {self.dtype} on a GPU" + (f", {engines}" if self.replicas > 1 else "")
        if not self.engine_gpus:
            return f"in {self.dtype} on {_gpus(self.trainer_gpus)}"
        where = f"{engines} on {_gpus(sorted({*self.engine_gpus}))}, the trainer on {_gpus(self.trainer_gpus)}"
        return f"in {self.dtype}, {where}" + (f" ({self.reason})" if self.reason else "")

    @property
    def trainer_devices(self) -> str | None:
        """The trainer's GPUs, as CUDA_VISIBLE_DEVICES names them; None on a CPU."""
        return ",".join(visible_gpus()[gpu] for gpu in self.trainer_gpus) or None

    def gpus_of(self, replica: int) -> tuple[int, ...]:
        """One engine's."""
        return self.engine_gpus[replica * self.tensor_parallel :][: self.tensor_parallel]

    def cores_of(self, replica: int) -> frozenset[int] | None:
        """One engine's."""
        return divide(self.engine_cores, self.replicas)[replica]


def place(settings: RunSettings) -> Placement:
    """What this machine offers to this run. Blocks: it looks at the model, and may ask nvidia-smi.

    Raises ConfigError for what it does not offer, and as `split_cores`, `split_gpus`, `check_transport`, `check_memory` and
    `resolve_model` do.
    """
    dtype, wanted = resolve_dtype(settings), settings.placement
    if has_gpu():
        _refuse_cores(settings)
        placement = split_gpus(settings, dtype, len(visible_gpus()), partial(_smallest_fit, settings, dtype))
        check_transport(settings, placement)
        placement = replace(placement, kv_cache_gib=_kv_cache_gib(settings, placement))
        check_memory(settings, placement)
        return placement
    for name in ("colocate", "engines_a_gpu", "engine_gpus", "trainer_gpus"):
        if getattr(wanted, name) != type(wanted).model_fields[name].default:
            flag = f"--placement.{name.replace('_', '-')}"
            raise ConfigError(
                f"{flag}: expected GPUs, found none; on a CPU set --engine.cpu-cores and --trainer.cpu-cores"
            )
    tensor_parallel, _ = _smallest_fit(settings, dtype, [wanted.tensor_parallel or 1])
    cores = split_cores(settings, os.sched_getaffinity(0))
    placement = Placement(dtype, *cores, wanted.replicas or 1, tensor_parallel)
    check_transport(settings, placement)
    return placement


def place_trainer(settings: TrainingSettings) -> Placement:
    """What this machine offers to a trainer without an engine: all cores, unless the settings say which; of GPUs the first.
    Raises ConfigError as `split_cores` does, and for more ranks than GPUs."""
    dtype = resolve_dtype(settings)
    if has_gpu():
        _refuse_cores(settings)
        num_ranks, num_gpus = settings.trainer.megatron.num_ranks, len(visible_gpus())
        if num_ranks > num_gpus:
            raise ConfigError(f"--trainer.megatron: expected {num_ranks} GPUs, one a rank, found {num_gpus}")
        return Placement(dtype, None, None, trainer_gpus=tuple(range(num_ranks)))
    available = os.sched_getaffinity(0)
    cores = _explicit(settings.trainer.cpu_cores, "--trainer.cpu-cores", available) or frozenset(available)
    return Placement(dtype, frozenset(), cores)


def _refuse_cores(settings: TrainingSettings) -> None:
    """On GPUs nothing is pinned to cores."""
    for part in ("engine", "trainer"):
        if getattr(getattr(settings, part, None), "cpu_cores", "auto") != "auto":
            raise ConfigError(
                f"--{part}.cpu-cores: expected no GPU, for on one it does nothing; leave it out, or set "
                "CUDA_VISIBLE_DEVICES to nothing to compute on the CPU"
            )


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


def _explicit(given: str, flag: str, available: Collection[int], what: str = "cores") -> frozenset[int] | None:
    """`0-3,6` -> {0, 1, 2, 3, 6}; None for `auto`."""
    if given == "auto":
        return None
    if not _LIST.fullmatch(given):
        raise ConfigError(f"{flag}: expected auto or a list of {what} such as 0-3,6, got {given!r}")
    chosen: set[int] = set()
    for part in given.split(","):
        first, _, last = part.partition("-")
        span = range(int(first), int(last or first) + 1)
        if not span or not set(available).issuperset(span):
            raise ConfigError(f"{flag}: expected {what} among {sorted(available)}, the process's own, got {given!r}")
        chosen.update(span)
    return frozenset(chosen)


def split_gpus(
    settings: RunSettings, dtype: Dtype, num_gpus: int, fit: Callable[[Sequence[int]], tuple[int, str]]
) -> Placement:
    """Engines and trainer on so many GPUs. `fit` chooses how many of them an engine has, and says why.

    By default the trainer gets one GPU for each rank, and engines all others; where they share, by `colocate` or since there is
    but one GPU, engines all, and the trainer the first of those. Raises ConfigError where that is impossible.
    """
    wanted, num_ranks = settings.placement, settings.trainer.megatron.num_ranks
    every, is_shared = range(num_gpus), _may_share(settings, num_gpus)
    engine, trainer = _explicit_gpus(settings, num_gpus)
    if trainer is not None and len(trainer) != num_ranks:
        raise ConfigError(
            f"--placement.trainer-gpus: expected {num_ranks}, one for each rank (tensor x pipeline x data parallel), got "
            f"{wanted.trainer_gpus!r}; see --trainer.megatron"
        )
    if engine and trainer and engine & trainer and not is_shared:
        raise ConfigError(
            f"--placement.trainer-gpus: expected others than --placement.engine-gpus {wanted.engine_gpus!r}, got "
            f"{wanted.trainer_gpus!r}; let them share GPUs with --placement.colocate"
        )
    least = len(engine) if engine else (wanted.replicas or 1) * (wanted.tensor_parallel or 1)
    needed = max(least, num_ranks) if is_shared else least + num_ranks
    if needed > num_gpus:
        raise ConfigError(
            f"--placement: expected {needed} GPUs, {least} for engines and {num_ranks} for the trainer, found {num_gpus}; ask "
            "for fewer" + ("" if is_shared else ", or let them share GPUs with --placement.colocate")
        )
    taken = every[:0] if is_shared else trainer or every[num_gpus - num_ranks :]
    free = sorted(engine or {*every}.difference(taken))
    size, why = fit(_engine_sizes(settings, len(free), is_exact=engine is not None))
    _check_sharing(settings, size, why)
    replicas = wanted.replicas or len(free) // size
    engines = free[: replicas * size]
    others = [gpu for gpu in every if gpu not in engines]
    reasons = [why] if why else []
    if not engine and not wanted.replicas and num_gpus > 1:
        reasons.append("as many engines as there is room for")
    return Placement(
        dtype,
        None,
        None,
        replicas * wanted.engines_a_gpu,
        size,
        tuple(engines) * wanted.engines_a_gpu,
        tuple(sorted(trainer or (engines + others if is_shared else others)[:num_ranks])),
        "; ".join(reasons),
    )


def _explicit_gpus(settings: RunSettings, num_gpus: int) -> tuple[frozenset[int] | None, frozenset[int] | None]:
    """(engines', trainer's); None for `auto`."""
    wanted, every = settings.placement, range(num_gpus)
    engine = _explicit(wanted.engine_gpus, "--placement.engine-gpus", every, "GPUs")
    return engine, _explicit(wanted.trainer_gpus, "--placement.trainer-gpus", every, "GPUs")


def _may_share(settings: RunSettings, num_gpus: int) -> bool:
    """Whether the trainer may be on a GPU that an engine has."""
    engine, trainer = _explicit_gpus(settings, num_gpus)
    are_apart = engine is not None and trainer is not None and engine.isdisjoint(trainer)
    return (settings.placement.colocate or num_gpus == 1) and not are_apart


def check_transport(settings: RunSettings, placement: Placement) -> None:
    """Raises ConfigError for CUDA IPC without GPUs, and for a broadcast between ranks that share one."""
    if settings.refit.transport == "cuda_ipc" and not placement.trainer_gpus:
        raise ConfigError(
            "--refit.transport cuda_ipc: expected GPUs, found none; on a CPU leave it out, or use memory, broadcast or disk"
        )
    gpus = (*placement.engine_gpus, *placement.trainer_gpus[:1])
    if settings.refit.transport == "broadcast" and len({*gpus}) < len(gpus):
        raise ConfigError(
            "--refit.transport broadcast: expected a GPU for each rank of engines and one for the trainer's first, as NCCL "
            f"does, got {', '.join(map(str, gpus))}; use cuda_ipc"
        )


def check_memory(settings: RunSettings, placement: Placement) -> None:
    """Raises ConfigError where a GPU cannot hold what is sure to lie on it: weights, and KV caches of a fixed size. It says
    nothing of activations, and nothing at all without nvidia-smi. `--placement.tensor-parallel` asks for a try all the same."""
    if settings.placement.tensor_parallel:
        return
    try:
        found = gpu_bytes()
    except ConfigError:  # the run may need no such number, and CUDA says what it has no room for
        return
    kv_cache = settings.engine.kv_cache_gib or placement.kv_cache_gib or 0
    weights, megatron = weight_bytes(resolve_model(settings.model), placement.dtype), settings.trainer.megatron
    of_engine = _copies(settings) * weights / placement.tensor_parallel
    of_trainer = weights / (megatron.tensor_parallel * megatron.pipeline_parallel)
    for gpu in sorted({*placement.engine_gpus, *placement.trainer_gpus}):
        num_engines, has_trainer = placement.engine_gpus.count(gpu), gpu in placement.trainer_gpus
        needed = num_engines * (of_engine + (kv_cache << 30)) + has_trainer * of_trainer
        if needed > found:
            beside = f" and {kv_cache} GiB of KV cache" if kv_cache else ""
            parts = [f"{num_engines} x {of_engine / 1e9:.1f} GB of weights{beside} in engines"] if num_engines else []
            parts += [f"{of_trainer / 1e9:.1f} GB of weights in the trainer"] if has_trainer else []
            raise ConfigError(
                f"--placement: expected a GPU with more than {needed / 1e9:.1f} GB ({', '.join(parts)}), found {found / 1e9:.1f} "
                "GB; take more GPUs, for the trainer by --trainer.megatron, or a smaller --engine.kv-cache-gib, or, to try it "
                "all the same, set --placement.tensor-parallel"
            )


def _copies(settings: RunSettings) -> int:
    """Of its weights that an engine keeps."""
    return 2 if settings.refit.form == "merged" else 1


def _engine_sizes(settings: RunSettings, num_gpus: int, *, is_exact: bool) -> list[int]:
    """How many GPUs one engine may have, of so many for all; `is_exact`: all of which must be used."""
    wanted = settings.placement
    sizes = [wanted.tensor_parallel] if wanted.tensor_parallel else range(1, num_gpus + 1)
    if not is_exact:
        return [size for size in sizes if size * (wanted.replicas or 1) <= num_gpus]
    exact = [size for size in sizes if size * (wanted.replicas or num_gpus // size) == num_gpus]
    if not exact:
        raise ConfigError(
            f"--placement.engine-gpus: expected replicas x tensor-parallel of them, {wanted.replicas or 'any'} x "
            f"{wanted.tensor_parallel or 'any'}, got {wanted.engine_gpus!r}, which are {num_gpus}"
        )
    return exact


def _check_sharing(settings: RunSettings, size: int, why: str) -> None:
    """Of a GPU that engines share each needs its part."""
    number, share = settings.placement.engines_a_gpu, settings.engine.gpu_memory_utilization
    if number > 1 and size > 1:
        reason = f" ({why})" if why else ""
        raise ConfigError(
            f"--placement.engines-a-gpu {number}: expected engines of one GPU, got some of {size}{reason}"
        )
    if number > 1 and share is not None and settings.engine.kv_cache_gib is None and number * share > 0.95:
        raise ConfigError(
            f"--placement.engines-a-gpu {number}: expected a share of the memory for each, got --engine.gpu-memory-utilization "
            f"{share}; set at most {95 // number / 100:.2f}, or --engine.kv-cache-gib"
        )


def _memory_share(settings: RunSettings) -> float:
    """Of a GPU's memory, for each engine's weights and KV cache."""
    share = 0.4 if _may_share(settings, len(visible_gpus())) else MEMORY_SHARE
    return settings.engine.gpu_memory_utilization or share / settings.placement.engines_a_gpu


def _room_for_weights(settings: RunSettings) -> float:
    """Bytes of a GPU's memory, for one engine."""
    if (kv_cache := settings.engine.kv_cache_gib) is not None:
        return 0.95 * gpu_bytes() / settings.placement.engines_a_gpu - (kv_cache << 30)
    return gpu_bytes() * _memory_share(settings) / 2


def _kv_cache_gib(settings: RunSettings, placement: Placement) -> int | None:
    """Half of an engine's share, where it has others beside it: what they take while it starts, vLLM would count as its own."""
    is_alone = {*placement.engine_gpus}.isdisjoint(placement.trainer_gpus) and settings.placement.engines_a_gpu == 1
    if settings.engine.kv_cache_gib is not None or is_alone:
        return None
    return max(1, int(gpu_bytes() * _memory_share(settings) / 2) >> 30)


def _smallest_fit(settings: RunSettings, dtype: Dtype, sizes: Sequence[int]) -> tuple[int, str]:
    """The least of the ascending `sizes` with which the model's weights leave enough memory for a KV cache, and why."""
    if list(sizes) == [1]:
        return 1, ""
    model = resolve_model(settings.model)
    possible = [size for size in sizes if cannot_be_shared(model, size) is None]
    if not possible:
        raise ConfigError(
            f"--placement.tensor-parallel {sizes[0]}: expected a divisor of the model's {cannot_be_shared(model, sizes[0])}"
        )
    if len(possible) == 1:
        return possible[0], ""
    num_bytes, room = _copies(settings) * weight_bytes(model, dtype), _room_for_weights(settings)
    for size in possible:
        if num_bytes <= size * room:
            return size, f"{num_bytes / 1e9:.1f} GB of weights, of a GPU {room / 1e9:.1f} GB at most"
    raise ConfigError(
        f"--placement: expected GPUs for {num_bytes / 1e9:.1f} GB of weights in one engine, found {possible[-1]} x "
        f"{max(0, room) / 1e9:.1f} GB beside the KV cache (--engine.gpu-memory-utilization or --engine.kv-cache-gib); to try it "
        "all the same, set --placement.tensor-parallel"
    )


def divide(cores: frozenset[int] | None, num_parts: int) -> list[frozenset[int] | None]:
    """Each part's cores; parts share them where there are fewer."""
    if cores is None:
        return [None] * num_parts
    ordered = sorted(cores)
    return [frozenset(ordered[part::num_parts] or ordered[part % len(ordered) :][:1]) for part in range(num_parts)]


def visible_gpus() -> list[str]:
    """NVIDIA GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them: like CUDA, up to the first that there is not. Asks
    the device files, for torch would take seconds to import, and CUDA must not be initialised here."""
    found = [str(index) for index, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or not found:
        return found
    names = (name.strip() for name in chosen.split(","))
    return list(takewhile(lambda name: name in found or not (name.isdigit() or name in ("", "-1")), names))


def has_gpu() -> bool:
    """Whether this process sees an NVIDIA GPU."""
    return bool(visible_gpus())


@cache
def gpu_bytes() -> int:
    """Memory of the smallest GPU that this process sees. Raises ConfigError when nvidia-smi cannot say."""
    visible = f"--id={','.join(visible_gpus())}"
    command = ["nvidia-smi", visible, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return min(int(line) << 20 for line in answer.splitlines())
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        raise ConfigError(
            f"expected nvidia-smi to say how much memory a GPU has, got {error}; set --placement.tensor-parallel and "
            "--engine.kv-cache-gib"
        ) from error


def _gpus(gpus: Sequence[int]) -> str:
    return f"GPU{'s' if len(gpus) > 1 else ''} {', '.join(map(str, gpus))}"


def fast_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware (about twice as fast as float32)."""
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return flags is not None and not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags[1].split())


def resolve_dtype(settings: TrainingSettings) -> Dtype:
    """`auto` becomes bfloat16 on a GPU and on processors that are fast at it, else float32."""
    if settings.dtype != "auto":
        return settings.dtype
    return "bfloat16" if has_gpu() or fast_bfloat16() else "float32"
