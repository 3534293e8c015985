"""Microbatches through Megatron's schedules: without a pipeline, 1F1B, and interleaved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from rlloop.batching import Microbatch
from rlloop.trainer.attention import PackedLayout
from rlloop.trainer.flash import FlashLayout
from rlloop.trainer.head import token_logprobs
from rlloop.trainer.megatron import compat  # noqa: F401  (before anything under megatron)
from rlloop.trainer.megatron.adapter import Adapter
from rlloop.trainer.megatron.graph import Graphs
from rlloop.trainer.megatron.layer import Row, run_body
from rlloop.trainer.megatron.lora import LoraLinear
from rlloop.trainer.megatron.model import Model, inner_model
from rlloop.trainer.megatron.parallel import Groups
from rlloop.trainer.megatron.room import fill, needed_room
from rlloop.trainer.megatron.trace import Trace
from rlloop.trainer.tokens import Columns, to_device

from megatron.core.pipeline_parallel import get_forward_backward_func  # isort: skip
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region  # isort: skip


@dataclass(frozen=True, slots=True)
class Work:
    """What the head and the loss need of a microbatch, on the device. It is sent before the layers run: a copy that the
    host waits for would leave the device idle."""

    microbatch: Microbatch
    hidden_index: Tensor
    """[N], as in `Microbatch`; so is `targets`."""
    targets: Tensor
    columns: dict[str, Tensor | None]
    """[N] each, for the loss."""


OnOutputs: TypeAlias = Callable[[Tensor, Tensor | None, Work], Tensor | None]
"""(logprobs [N], entropy [N], work), or (values [N], None, work) -> the loss, or None where there is no backward pass."""


_EMPTY = Microbatch(
    tokens=np.zeros(1, dtype=np.int64),
    positions=np.zeros(1, dtype=np.int64),
    segment_starts=np.zeros(1, dtype=np.int64),
    segment_lengths=np.ones(1, dtype=np.int64),
    segment_prefixes=np.full(1, -1),
    hidden_index=np.zeros(0, dtype=np.int64),
    targets=np.zeros(0, dtype=np.int64),
    loss_index=np.zeros(0, dtype=np.int64),
)


class Schedule:
    """Runs microbatches through this copy of the model. `graph_tokens`: use CUDA graphs with room for up to that many tokens."""

    def __init__(
        self, model: Model, groups: Groups, temperature: float, trace: Trace, graph_tokens: int | None
    ) -> None:
        self._model = model
        self._groups = groups
        self._temperature = temperature
        self._trace = trace
        self._graphs = None
        if graph_tokens is not None:
            self._graphs = Graphs(inner_model(model.chunks[0]), graph_tokens, groups.device)

    def run(
        self,
        microbatches: Sequence[Microbatch],
        columns: Columns,
        on_outputs: OnOutputs,
        *,
        adapter: Adapter | None,
        backward: bool,
        before_each: Callable[[], None],
    ) -> None:
        """Forward, and with `backward` backward; `adapter` is the one that is active.

        `on_outputs` is called on the last stage, `before_each` before every forward pass of a chunk.
        """
        if not microbatches:
            return
        if len(self._model.chunks) > 1:  # interleaved stages take them in rounds
            microbatches = [*microbatches, *[_EMPTY] * (-len(microbatches) % self._groups.pp_size)]

        def forward_step(data: Iterator[tuple[int, Microbatch]], chunk: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
            before_each()
            index, microbatch = next(data)
            inner = inner_model(chunk)
            place = {"microbatch": index, "chunk": inner.vp_stage or 0}
            with self._trace.span("forward", **place):
                hidden = self._body(microbatch, inner, adapter)
            if not inner.post_process:
                self._trace.backward(hidden, **place)

            def loss(hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
                work = self._prepare(microbatch, columns)  # while the device computes the body
                with self._trace.span("head", **place):
                    outputs, entropy = self._head(hidden, work, adapter)
                    value = on_outputs(outputs, entropy, work) if len(outputs) else outputs.sum()
                if value is not None:
                    self._trace.backward(value, **place)
                num_tokens = torch.ones((), dtype=torch.int, device=self._groups.device)  # nobody divides by it
                return outputs.new_zeros(()) if value is None else value, num_tokens, {}

            return hidden, loss

        LoraLinear.is_training = backward
        try:
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=[iter(enumerate(microbatches)) for _ in self._model.chunks],
                model=self._model.chunks,
                num_microbatches=len(microbatches),
                seq_length=max(self._padded(len(microbatch.tokens)) for microbatch in microbatches),
                micro_batch_size=1,
                forward_only=not backward,
            )
        finally:
            LoraLinear.is_training = False

    def _body(self, microbatch: Microbatch, chunk: Any, adapter: Adapter | None) -> Tensor:
        """-> hidden states [T or more, 1, C]."""
        # A graph of training drops inputs.
        if self._graphs is not None and adapter is not None and (LoraLinear.is_training or not adapter.lora.dropout):
            hidden = self._graphs.run(microbatch, adapter)
            if hidden is not None:
                return hidden
        padded = fill(microbatch, needed_room(microbatch, self._padded(len(microbatch.tokens))))
        device, dtype = self._groups.device, self._model.config.params_dtype
        is_flash = device.type == "cuda" and dtype != torch.float32
        layout = FlashLayout.of(padded, device) if is_flash else PackedLayout(padded, device=device, dtype=dtype)
        row = Row(layout, to_device(padded.positions, device), int(padded.positions.max()) + 1)
        return run_body(chunk, to_device(padded.tokens, device), row)

    def _head(self, hidden_states: Tensor, work: Work, adapter: Adapter | None) -> tuple[Tensor, Tensor | None]:
        """-> logprobs and entropy of the loss tokens, [N]; or their values, of a value adapter."""
        hidden, groups = hidden_states[:, 0], self._groups
        if self._model.config.sequence_parallel:
            # The head adds up its gradient over the ranks itself.
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=groups.tp)
        predicting = hidden.index_select(0, work.hidden_index)
        if adapter is not None and adapter.head == "value":
            return adapter.values(predicting), None
        assert self._model.head is not None
        return token_logprobs(
            predicting,
            self._model.head,
            work.targets,
            temperature=self._temperature,
            group=groups.tp if groups.tp_size > 1 else None,
        )

    def _prepare(self, microbatch: Microbatch, columns: Columns) -> Work:
        device = self._groups.device
        return Work(
            microbatch=microbatch,
            hidden_index=to_device(microbatch.hidden_index, device),
            targets=to_device(microbatch.targets, device),
            columns=columns.of(microbatch, device),
        )

    def _padded(self, num_tokens: int) -> int:
        """Under sequence parallelism each rank holds as many tokens."""
        multiple = self._groups.tp_size if self._model.config.sequence_parallel else 1
        return -(-num_tokens // multiple) * multiple
