"""vLLM's AsyncLLM as an engine: one process samples, several LoRA versions are served side by side."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import anyio
import numpy as np

from rlloop.config import EngineSettings
from rlloop.engine import vllm_arguments, vllm_compat
from rlloop.engine.flights import HOPPING, HOPPING_ID, Flight, Flights, Swap, continued, joined
from rlloop.engine.scheduler import OUTPUTS_AT_THE_END, SCHEDULER, TALLY
from rlloop.engine.tally import Tally
from rlloop.engine.vllm_start import start_llm
from rlloop.errors import EngineError, RefitError
from rlloop.models import weight_bytes
from rlloop.types import Completion, EngineStatistics, GenerationRequest, LoraConfig, RefitForm, RefitReport, Ticket

WORKER_EXTENSION = "rlloop.refit.worker.LoraRefit"


@dataclass(frozen=True, slots=True)
class _Version:
    """One that is loaded."""

    name: str
    """vLLM keys its prefix cache by it: never used again, though a later run may publish the same number."""
    published: float
    """time.monotonic() when that was done."""


class VllmEngine:
    """See `rlloop.engine.Engine`. Make one with `start_vllm`; asyncio only, as vLLM is."""

    def __init__(
        self,
        llm: Any,
        tally: Tally,
        max_model_len: int,
        log_path: Path,
        *,
        serves_hops: bool = False,
        form: RefitForm = "adapter",
    ) -> None:
        self._llm = llm
        self._tally = tally
        self._max_model_len = max_model_len
        self._last_words = f"the vLLM engine process died; its last words are in {log_path}, unless memory ran out"
        self._form = form
        self._is_in_weights = form != "adapter"
        """The version, and not in an adapter beside them."""
        self._serves_hops = serves_hops or self._is_in_weights
        self._flights = Flights()
        self._workers = anyio.Lock()
        """One call at a time: each watches for the engine's death, as one task can."""
        self._versions: dict[int, _Version] = {}
        self._refusal: RefitError | None = None
        """Of a version that may have left a mixture, for which none is served."""
        self._num_published = 0
        self._first_token_seconds: dict[int, float] = {}
        self._num_in_flight = 0
        self._busy_since = 0.0
        self._busy_seconds = 0.0

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        """See `Engine.generate`."""
        found, cut_off = await self._sample(request)
        parts = found
        while cut_off:
            request = continued(request, parts[-1])
            found, cut_off = await self._sample(request)
            parts += found
        return [joined(parts)] if request.in_flight == "restart" else found

    async def _sample(self, request: GenerationRequest) -> tuple[list[Completion], bool]:
        """What vLLM makes of one request, and whether a restart cut it off."""
        self._check(request)
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            n=request.n,
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            seed=request.seed,
            stop=list(request.stop),
            detokenize=bool(request.stop),
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,  # nobody else has them, and a deep copy takes 50 us
            # Not of what restarts, whose tokens before the abort are read, nor where vLLM's front end is who finds the end.
            extra_args=None if request.in_flight == "restart" or request.stop else {OUTPUTS_AT_THE_END: True},
        )
        version = request.policy_version if request.in_flight == "finish" else self._newest
        name, hops = self._versions[version].name, request.in_flight == "hop"
        # Where no adapter's name goes with the version the salt keeps the prefix cache apart. As an engine input, for vLLM 0.32
        # hands anything else to a thread first, and an abort meanwhile finds no request.
        salt = name if hops or self._is_in_weights else None
        prompt = tokens_input(list(request.tokens), cache_salt=salt)
        adapter = None
        if not self._is_in_weights:
            adapter = _lora_request(HOPPING, HOPPING_ID) if hops else _lora_request(name, version + 1)
        final = None
        with (
            self._counted(),
            self._death_is_an_engine_error(),
            self._flights.start(version, request.in_flight) as flight,
        ):
            async for output in self._llm.generate(prompt, params, flight.request_id, lora_request=adapter):
                final = output
        if final is None:
            raise EngineError("vLLM ended a request without an output")
        first_token_at = final.metrics.first_token_ts
        self._note_first_token(version, first_token_at)
        cut_off = any(output.finish_reason == "abort" for output in final.outputs)
        if cut_off and request.in_flight != "restart":
            raise EngineError("vLLM aborted a request that nobody wanted to end")
        return [_completion(output, flight, first_token_at) for output in final.outputs], cut_off

    async def publish(self, version: int, ticket: Ticket) -> RefitReport:
        """See `Engine.publish`."""
        started = time.monotonic()
        if self._is_in_weights and version in self._versions:
            raise RefitError(f"policy version {version} is loaded already; a version is immutable")
        # Not by asdict, which would copy the names and shapes one by one.
        sent = {field.name: getattr(ticket, field.name) for field in fields(ticket)}

        def serve(ranks: list[dict[str, Any]]) -> None:
            if not _first_problem(ranks, ticket):
                self._serve(version, ranks[0])

        ranks = await self._call_workers("refit_load", version, sent, self._form, self._serves_hops, on_answer=serve)
        if problem := _first_problem(ranks, ticket):
            refusal = RefitError(f"the engine refused policy version {version}: {problem}")
            was_there = version in self._versions
            if any("swapped_at" in rank for rank in ranks):
                # The weights, or those of requests that hop, may be a mixture. Requests that come now must not hide the reason.
                self._versions.clear()
                self._refusal = refusal
            try:
                if not was_there:  # some ranks may hold it
                    await self._call_workers("refit_drop", version)
            except EngineError as error:
                raise refusal from error
            raise refusal
        await self._restart_stale()
        return RefitReport(
            policy_version=version,
            num_bytes=ranks[0].get("num_bytes", ticket.num_bytes),
            export_seconds=ticket.export_seconds,
            transfer_seconds=max(rank["transfer_seconds"] for rank in ranks),
            load_seconds=max(rank["load_seconds"] for rank in ranks),
            verify_seconds=max(rank["verify_seconds"] for rank in ranks),
            publish_seconds=ticket.export_seconds + time.monotonic() - started,
        )

    def _serve(self, version: int, rank: dict[str, Any]) -> None:
        """Requests get this version from here on, and those that are moved have it. Not a turn of the loop later than the workers
        say so: a request may end in that turn, and its last tokens are of this version."""
        self._num_published += 1
        self._refusal = None
        if self._is_in_weights:
            self._versions.clear()
        self._versions[version] = _Version(f"policy-v{version}-{self._num_published}", time.monotonic())
        if self._serves_hops:
            swap = Swap(version, rank["swapped_at"], rank["num_sampled"])
            self._flights.swap(swap, moves_all=self._is_in_weights)

    async def retire(self, version: int) -> None:
        """See `Engine.retire`."""
        self._first_token_seconds.pop(version, None)
        # First: from here on `generate` refuses it. It is gone already if an earlier call was cancelled.
        self._versions.pop(version, None)
        await self._restart_stale()
        await self._flights.leave(version)
        await self._call_workers("refit_drop", version)

    def statistics(self) -> EngineStatistics:
        """See `Engine.statistics`."""
        running = time.monotonic() - self._busy_since if self._num_in_flight else 0.0
        return EngineStatistics(
            num_generated_tokens=self._tally.num_tokens,
            busy_seconds=self._busy_seconds + running,
            num_running=self._tally.num_running,
            num_waiting=self._tally.num_waiting,
            kv_cache_usage=self._tally.kv_cache_usage,
            longest_gap_seconds=self._tally.longest_gap_seconds,
            first_token_seconds=dict(self._first_token_seconds),
        )

    def reset_longest_gap(self) -> None:
        """See `Engine.reset_longest_gap`."""
        self._tally.reset_longest_gap()

    async def _restart_stale(self) -> None:
        stale = self._flights.to_restart(self._newest)
        if stale and self._versions:
            await self._llm.abort(stale)

    @property
    def _newest(self) -> int:
        return max(self._versions, default=-1)

    def _check(self, request: GenerationRequest) -> None:
        if self._refusal is not None:
            raise self._refusal
        pinned = request.in_flight == "finish"
        if not pinned and not self._versions:
            raise EngineError("no policy version is loaded")
        if pinned and request.policy_version not in self._versions:  # vLLM's engine process dies of it
            raise EngineError(
                f"policy version {request.policy_version} is not loaded; the engine serves {sorted(self._versions)}"
            )
        if not pinned and (request.n > 1 or request.policy_version > self._newest):
            raise EngineError(
                f"a request that may {request.in_flight} asks for one completion of a version up to the newest, "
                f"{self._newest}; got n {request.n}, policy version {request.policy_version}"
            )
        if request.in_flight == "restart" and request.stop:
            raise EngineError(
                "a request with stop strings cannot restart, for one may lie across the cut, where nobody looks for it: use "
                "--refit.in-flight finish or hop"
            )
        if request.in_flight == "hop" and not self._serves_hops:
            raise EngineError("this engine was not started to let requests hop: use --refit.in-flight hop")
        if len(request.tokens) + request.max_tokens > self._max_model_len:
            raise EngineError(
                f"{len(request.tokens)} prompt tokens and max_tokens {request.max_tokens} exceed --engine.max-model-len "
                f"({self._max_model_len})"
            )

    def _note_first_token(self, version: int, at: float) -> None:
        if at and version in self._versions:  # 0: it was aborted before
            seconds = at - self._versions[version].published
            self._first_token_seconds[version] = min(seconds, self._first_token_seconds.get(version, seconds))

    async def _call_workers(
        self, method: str, *args: Any, on_answer: Callable[[list[Any]], None] | None = None
    ) -> list[Any]:
        """What each rank's worker answers. Raises EngineError when the engine dies, for whose answer vLLM waits forever."""

        async def watch(sentinel: int) -> None:
            await anyio.wait_readable(sentinel)
            raise EngineError(self._last_words)

        try:
            async with self._workers, anyio.create_task_group() as tasks:
                for sentinel in vllm_compat.sentinels(self._llm):
                    tasks.start_soon(watch, sentinel)
                answers: list[Any] = await self._llm.collective_rpc(method, args=args)
                if on_answer is not None:
                    on_answer(answers)
                tasks.cancel_scope.cancel()
        except ExceptionGroup as group:
            with self._death_is_an_engine_error():
                raise group.exceptions[0] from None
        return answers

    @contextmanager
    def _counted(self) -> Iterator[None]:
        if self._num_in_flight == 0:
            self._busy_since = time.monotonic()
        self._num_in_flight += 1
        try:
            yield
        finally:
            self._num_in_flight -= 1
            if self._num_in_flight == 0:
                self._busy_seconds += time.monotonic() - self._busy_since

    @contextmanager
    def _death_is_an_engine_error(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if vllm_compat.is_death(error):
                raise EngineError(self._last_words) from error
            raise


def _completion(output: Any, flight: Flight, first_token_at: float) -> Completion:
    """Of one of vLLM's CompletionOutputs."""
    version, versions = flight.version, None
    if flight.swaps and output.token_ids:
        versions = flight.token_versions(len(output.token_ids), first_token_at)
        version = int(versions[0])
        if version == versions[-1]:
            versions = None
    logprobs = output.logprobs.logprobs if output.logprobs else ()
    if len(logprobs) != len(output.token_ids):
        raise EngineError(f"vLLM returned {len(output.token_ids)} tokens with {len(logprobs)} logprobs")
    return Completion(
        tokens=np.asarray(output.token_ids, dtype=np.int32),
        logprobs=np.asarray(logprobs, dtype=np.float32),
        policy_version=version,
        finish_reason="stop" if output.finish_reason == "stop" else "length",
        token_versions=versions,
    )


def _first_problem(ranks: Sequence[dict[str, Any]], ticket: Ticket) -> str | None:
    for rank, held in enumerate(ranks):
        if "error" in held:
            return f"{held['error']} (rank {rank})"
        if held["digest"] != ticket.digest or held["different"]:
            where = f"first in {held['different']}" if held["different"] else "already as they arrived"
            return (
                f"rank {rank} holds {held['digest']}, but the trainer sent {ticket.digest} (they differ {where}): the engine "
                "would have sampled from other weights than those that were trained"
            )
    return None


def _lora_request(name: str, adapter_id: int) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, lora_int_id=adapter_id, lora_path="in-memory")  # never read


@asynccontextmanager
async def start_vllm(
    model: str,
    settings: EngineSettings,
    *,
    dtype: str,
    lora: LoraConfig,
    num_versions: int,
    log_path: Path,
    cores: frozenset[int] | None,
    serves_hops: bool = False,
    form: RefitForm = "adapter",
    gpus: Sequence[int] = (),
    tensor_parallel: int = 1,
) -> AsyncIterator[VllmEngine]:
    """Run vLLM while the block runs.

    `lora`: of the adapters that it will serve, the greatest rank and all targets. `num_versions`: policy versions that it can
    hold at once; `merged` is always one. `serves_hops`: requests may have `in_flight` "hop", which takes one more slot. `cores`:
    where it computes on a CPU; None means GPUs, `gpus` of those that this process sees, or the first. `tensor_parallel`: how many
    GPUs, or processes on a CPU, share the layers.
    """
    tally = Tally()
    # Beside the weights that are merged, on each GPU.
    keeps = form == "merged" and cores is None and settings.kv_cache_gib is None
    kept = weight_bytes(Path(model), dtype) // tensor_parallel if keeps else 0
    arguments = {
        "model": model,
        "dtype": dtype,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "logprobs_mode": "processed_logprobs",  # at the sampling temperature
        "worker_extension_cls": WORKER_EXTENSION,
        "scheduler_cls": SCHEDULER,
        "use_tqdm_on_load": False,
        "tensor_parallel_size": tensor_parallel,
        **(vllm_arguments.slots(num_versions + serves_hops, lora) if form == "adapter" else {}),
        **vllm_arguments.device_arguments(settings, cores, kept),
    }

    def variables() -> dict[str, str]:
        return {TALLY: tally.location, **vllm_arguments.variables(settings, log_path, cores, tensor_parallel, gpus)}

    vllm_arguments.set_environment()
    llm = await start_llm(arguments, variables, log_path)
    try:
        yield VllmEngine(llm, tally, settings.max_model_len, log_path, serves_hops=serves_hops, form=form)
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(vllm_compat.end_processes, llm)
        llm.shutdown()
        llm.shutdown = lambda *_: None  # its __del__ would call it again, when the interpreter has taken vLLM apart
