"""One rank of the `megatron` trainer: its part of the model, adapters and optimizers. Runs in the rank's process.

Every rank runs every call; what only some of them know is gathered, and rank 0's answer counts."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlloop.batching import pack
from rlloop.errors import TrainerError
from rlloop.trainer import Head, Loss, TokenBatch
from rlloop.trainer.adapter_files import check_lora, merged, peft_config, read_adapter, write_adapter
from rlloop.trainer.megatron.adapter import Adapter
from rlloop.trainer.megatron.graph import wants_graphs
from rlloop.trainer.megatron.model import build_model
from rlloop.trainer.megatron.parallel import start_groups
from rlloop.trainer.megatron.schedule import OnOutputs, Schedule, Work
from rlloop.trainer.megatron.trace import Trace
from rlloop.trainer.rank_trainer import RankArguments
from rlloop.trainer.ranks import Interrupted, RankContext
from rlloop.trainer.steps import SkippedSteps, get_adapter, gradient_discarded_on_error, measure_peak, throughput
from rlloop.trainer.tokens import Columns, Summary, Totals
from rlloop.types import AdamConfig, AdapterTicket, FloatArray, LoraConfig, Metrics, OptimResult, Sample


class MegatronRank:
    """See `MegatronTrainer`, whose methods these are."""

    def __init__(self, context: RankContext, arguments: RankArguments, address: str, events_path: Path | None) -> None:
        self._context = context
        self._settings = settings = arguments.settings
        self._writer = arguments.writer
        self._sender = arguments.sender
        if self._sender is not None and context.rank == 0:
            self._sender.listen()
        self._folder = arguments.model
        self._dtype: torch.dtype = getattr(torch, arguments.dtype)
        parallel = settings.megatron
        self._groups = start_groups(parallel, context.rank, context.num_ranks, address, arguments.seed)
        recompute = settings.gradient_checkpointing
        self._model = build_model(arguments.model, parallel, self._groups, self._dtype, recompute=recompute)
        use_graphs = wants_graphs(settings, self._groups, self._model, self._dtype)
        graph_tokens = settings.max_tokens_per_microbatch if use_graphs else None
        self._trace = Trace(events_path, context.rank, self._groups.device)
        self._schedule = Schedule(self._model, self._groups, arguments.temperature, self._trace, graph_tokens)
        self._adapters: dict[str, Adapter] = {}
        self._skipped = SkippedSteps(settings.max_nonfinite_steps)
        self._active: str | None = None
        self._is_switching = False
        self._is_warm = False
        num_head = 0 if self._model.head is None else self._model.head.numel()
        counts = torch.tensor([self._model.num_weights, num_head], device=self._groups.device)
        torch.distributed.all_reduce(counts, group=self._groups.model)
        self._num_body, self._num_head = counts.tolist()
        self._peak_flops = measure_peak(self._groups.device, self._dtype) * context.num_ranks

    def close(self) -> None:
        """Free what the transport holds."""
        self._writer.close()
        if self._sender is not None:
            self._sender.close()
        self._trace.close()

    def create_adapter(self, name: str, lora: LoraConfig, head: Head = "policy") -> None:
        """A is drawn by parameter name, so it depends on neither layout nor other adapters."""
        if name in self._adapters:
            raise TrainerError(f"adapter {name!r} exists already")
        check_lora(name, lora, set().union(*self._groups.gather(self._model.targets)))
        hidden_size = self._model.config.hidden_size
        self._adapters[name] = Adapter(lora, head, self._model.layers, hidden_size, self._groups, self._dtype)
        if self._groups.device.type == "cuda" and not self._is_warm:
            try:
                self.warm_up(name)
            except Exception:
                self.remove_adapter(name)
                raise
            self._is_warm = True

    def warm_up(self, name: str) -> None:
        """Compute a gradient and logprobs, and forget them; the random state stays as it is.

        Torch compiles for one size when it meets a function first, and for any at the second, together half a minute. Here
        engines start meanwhile. The sizes are large enough for kernels that are made for many tokens.
        """
        adapter, num_tokens = self._get(name), min(2048, self._settings.max_tokens_per_microbatch)
        devices = [self._groups.device] if self._groups.device.type == "cuda" else []
        self._activate(name)
        with gradient_discarded_on_error(adapter.discard_gradient), torch.random.fork_rng(devices):
            for backward, size in product((True, False), (num_tokens, num_tokens // 2)):
                samples = _blank_samples(size)
                with torch.set_grad_enabled(backward):
                    self._schedule.run(  # the same on every rank
                        pack(samples, num_tokens),
                        Columns(samples),
                        lambda outputs, *_: outputs.sum(),
                        adapter=adapter,
                        backward=backward,
                        before_each=self._check_interrupt,
                    )
        adapter.discard_gradient()
        self._trace.flush()

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter and its optimizer, if it is there."""
        if name not in self._adapters:
            return
        if self._active == name:
            self._activate(None)
        del self._adapters[name]
        self._skipped.forget(name)

    def forward_backward(self, name: str, samples: Sequence[Sample], loss: Loss) -> Metrics:
        """Gradients add up until `optim_step`; an interrupted call discards them."""
        started = time.perf_counter()
        adapter = self._get(name)
        columns, totals = Columns(samples), Totals()

        def on_outputs(outputs: Tensor, entropy: Tensor | None, work: Work) -> Tensor:
            tokens = TokenBatch(**work.columns, entropy=entropy)
            value, metrics = loss(outputs, tokens)
            totals.add(value, tokens, work.microbatch, metrics)
            return value

        with gradient_discarded_on_error(adapter.discard_gradient):
            self._activate(name)
            self._run(samples, columns, on_outputs, backward=True)
        summary = Summary.merge(self._groups.gather(totals.summary() if self._answers else Summary()))
        self._groups.synchronize()  # only the last stage waits for its metrics, and the first one ends last
        adapter.loss_was_finite &= summary.is_finite
        self._trace.flush()
        seconds = time.perf_counter() - started
        return summary.metrics() | throughput(
            summary,
            seconds,
            num_body=self._num_body,
            num_head=self._num_head if adapter.head == "policy" else 0,
            peak_flops=self._peak_flops,
        )

    def optim_step(self, name: str, adam: AdamConfig) -> OptimResult:
        """AdamW in fp32. A skipped step leaves weights and moments bit for bit as they were."""
        adapter = self._get(name)
        with self._trace.span("reduce_gradient"):
            grad_norm = adapter.reduce_gradient() if adapter.loss_was_finite else math.nan
        skipped = not math.isfinite(grad_norm)
        with self._trace.span("optimizer"):
            if not skipped:
                adapter.step(adam, grad_norm)
        adapter.discard_gradient()
        self._skipped.count(name, skipped)
        return OptimResult(grad_norm=grad_norm, skipped=skipped)

    def logprobs(self, name: str | None, samples: Sequence[Sample]) -> list[FloatArray]:
        """Of an adapter with a policy head, or of the base."""
        self._activate(name, "policy")
        return self._evaluate(samples)

    def values(self, name: str, samples: Sequence[Sample]) -> list[FloatArray]:
        """Of an adapter with a value head."""
        self._activate(name, "value")
        return self._evaluate(samples)

    def export_adapter(self, name: str) -> AdapterTicket | None:
        """The transport scales B and casts."""
        adapter = self._get(name, "policy")
        tensors = adapter.export()
        if self._groups.rank != 0:
            return None
        return self._writer.write(tensors, adapter.lora.alpha / adapter.lora.rank)

    @torch.no_grad()
    def export_weights(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """The model with the adapter merged, W + s B A, by Hugging Face names, whole, on rank 0; every rank must exhaust it."""
        adapter = self._get(name, "policy")
        if self._groups.tp_size * self._groups.pp_size > 1:  # the bridge sends weights as they lie
            self._activate(None)
            for adaptable in self._model.layers:
                adaptable.layer.move_back()
        exported = adapter.export()
        for hf_name, weight in self._model.export():
            yield hf_name, merged(hf_name, weight, exported, adapter.lora)

    def send_weights(self, name: str) -> None:
        """To all who ask."""
        assert self._sender is not None
        weights = self.export_weights(name)
        try:
            if self._groups.rank == 0:
                self._sender.send(weights, self._context.check_interrupt)
        finally:
            deque(weights, maxlen=0)  # every rank makes its part of each

    def save(self, name: str, folder: Path) -> None:
        """In PEFT's format, whole tensors (see `adapter_files`)."""
        adapter = self._get(name)
        weights, moments = adapter.export(), adapter.export_moments()
        if self._groups.rank == 0:
            write_adapter(folder, peft_config(adapter.lora, self._folder), weights, moments)

    def load(self, name: str, folder: Path) -> None:
        """What this or another trainer saved, whatever its parallel sizes were."""
        adapter = self._get(name)
        weights, moments = read_adapter(folder, name, adapter.shapes)
        adapter.load(weights, moments)
        adapter.discard_gradient()

    @property
    def _answers(self) -> bool:
        """Whether this rank has logprobs that no other rank has."""
        return self._groups.is_last_stage and self._groups.tp_rank == 0

    @torch.no_grad()
    def _evaluate(self, samples: Sequence[Sample]) -> list[FloatArray]:
        """Outputs of what is active, in microbatches, like training."""
        found: list[tuple[np.ndarray, np.ndarray]] = []

        def on_outputs(outputs: Tensor, entropy: Tensor | None, work: Work) -> None:
            found.append((work.microbatch.loss_index, outputs.cpu().numpy()))

        self._run(samples, Columns(samples), on_outputs, backward=False)
        self._trace.flush()
        flat = np.zeros(sum(len(sample.tokens) for sample in samples), dtype=np.float32)
        for part in self._groups.gather(found if self._answers else []):
            for index, outputs in part:
                flat[index] = outputs
        return np.split(flat, np.cumsum([len(sample.tokens) for sample in samples]))[:-1]

    def _run(self, samples: Sequence[Sample], columns: Columns, on_outputs: OnOutputs, *, backward: bool) -> None:
        if any(self._groups.gather(self._context.is_interrupted)):
            raise Interrupted("the trainer's call was interrupted")
        part, num_parts = self._groups.dp_rank, self._groups.dp_size
        self._schedule.run(
            pack(samples, self._settings.max_tokens_per_microbatch, part=part, num_parts=num_parts),
            columns,
            on_outputs,
            adapter=None if self._active is None else self._adapters[self._active],
            backward=backward,
            before_each=self._check_interrupt,
        )

    def _check_interrupt(self) -> None:
        """Several ranks would have to agree on where to stop: they go on to the end of the call."""
        if self._context.num_ranks == 1:
            self._context.check_interrupt()

    def _get(self, name: str, head: Head | None = None) -> Adapter:
        return get_adapter(self._adapters, name, head)

    def _activate(self, name: str | None, head: Head | None = None) -> None:
        if name is not None:
            self._get(name, head)
        if name == self._active and not self._is_switching:
            return
        self._is_switching = True  # until it is done: memory may run out on the way
        for adapter in self._adapters.values():
            adapter.deactivate()
        if name is None:
            for adaptable in self._model.layers:
                adaptable.layer.set_lora(None)
        else:
            self._get(name).activate(self._model.layers)
        self._active, self._is_switching = name, False


def _blank_samples(num_tokens: int) -> list[Sample]:
    """That together make one microbatch of nearly so many tokens."""
    length = min(num_tokens, 255)  # of which the last token is not computed
    zeros = np.zeros(length + 1, np.float32)
    mask, tokens = np.arange(length + 1) > 0, np.zeros(length + 1, np.int32)
    return [Sample(tokens, mask, zeros, zeros, zeros, prompt_id=index) for index in range(num_tokens // length)]
