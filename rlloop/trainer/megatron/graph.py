"""CUDA graphs of all layers, forward and backward: for models whose kernels are shorter than it takes to launch them.

A graph replays the same kernels on the same memory, so a microbatch is copied into buffers with room for it, and filled up
with segments that nothing reads. There are graphs of several sizes, each captured when it is first needed, and all in one
memory, for they run one after another. The head and the loss stay outside: their tokens vary most, and they are few kernels.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rlloop.batching import Microbatch
from rlloop.config import TrainerSettings
from rlloop.errors import TrainerError
from rlloop.trainer.flash import FlashLayout, count_keys, ends, index_keys
from rlloop.trainer.megatron.adapter import Adapter
from rlloop.trainer.megatron.layer import Row, run_body
from rlloop.trainer.megatron.lora import LoraLinear
from rlloop.trainer.megatron.model import Model
from rlloop.trainer.megatron.parallel import Groups
from rlloop.trainer.megatron.room import Room, fill, fitting_size, needed_room, padded

_LARGEST_LAUNCH_BOUND = 2 * 10**9
"""Weights of a model that is faster with graphs: SmolLM2-135M 1.4x, Qwen2.5-1.5B 1.01x (and 2 GB less), Llama-3-8B not."""


def wants_graphs(settings: TrainerSettings, groups: Groups, model: Model, dtype: torch.dtype) -> bool:
    """Whether to use them. Raises TrainerError when they are wanted where they cannot be used."""
    wish = settings.megatron.cuda_graphs
    obstacles = {
        "no GPU": groups.device.type != "cuda",
        "float32": dtype == torch.float32,
        "several ranks that share a model": groups.tp_size * groups.pp_size > 1,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "Megatron's own layers": not model.is_fast,
    }
    obstacle = next((name for name, applies in obstacles.items() if applies), None)
    if obstacle and wish == "on":
        raise TrainerError(f"--trainer.megatron.cuda-graphs on: expected a GPU that holds the model, got {obstacle}")
    return not obstacle and (wish == "on" or (wish == "auto" and model.num_weights < _LARGEST_LAUNCH_BOUND))


class Graphs:
    """Of one chunk that is the whole model, for each adapter and size. `max_tokens`: of the largest."""

    def __init__(self, chunk: Any, max_tokens: int, device: torch.device) -> None:
        self._chunk = chunk
        self._max_tokens = max_tokens
        self._device = device
        self._rooms: dict[int, Room] = {}
        self._graphs: WeakKeyDictionary[Adapter, dict[int, _Graph]] = WeakKeyDictionary()
        self._first = torch.cuda.CUDAGraph()  # a pool whose last graph went cannot be used again, so one stays
        with torch.cuda.graph(self._first):
            torch.zeros(1, device=device)

    def run(self, microbatch: Microbatch, adapter: Adapter) -> Tensor | None:
        """-> hidden states [room, 1, C], the first T of them the microbatch's; None when it is larger than all rooms.

        The next call overwrites them, so finish the backward pass before.
        """
        size = fitting_size(len(microbatch.tokens), self._max_tokens)
        if size is None:
            return None
        room = self._rooms.get(size, Room(size, 16, 0, 64)).grown(needed_room(microbatch, size))
        self._rooms[size] = room
        graphs = self._graphs.setdefault(adapter, {})
        graph = graphs.get(size)
        if graph is None or graph.room != room or graph.weights_moved != LoraLinear.weights_moved:
            graph = graphs[size] = _Graph(self._chunk, room, self._device, self._first.pool(), microbatch)
        return graph(microbatch)


class _Graph:
    def __init__(self, chunk: Any, room: Room, device: torch.device, pool: Any, example: Microbatch) -> None:
        self.room = room
        self.weights_moved = LoraLinear.weights_moved
        self._tokens = torch.zeros(room.num_tokens, dtype=torch.long, device=device)
        self._positions = torch.zeros_like(self._tokens)
        self._layout = FlashLayout(
            query_ends=torch.zeros(room.num_segments + 1, dtype=torch.int32, device=device),
            key_ends=torch.zeros(room.num_segments + 1, dtype=torch.int32, device=device),
            key_index=torch.zeros(room.num_keys, dtype=torch.long, device=device) if room.num_keys else None,
            longest=room.longest,
        )
        self._anchor = torch.zeros((), device=device, requires_grad=True)

        def forward() -> Tensor:
            return run_body(chunk, self._tokens, Row(self._layout, self._positions, room.longest))

        self._load(example)
        with torch.enable_grad():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # compiles; its gradient of zero adds nothing to the adapter's
                for _ in range(2):
                    hidden = forward()
                    hidden.backward(torch.zeros_like(hidden))
            torch.cuda.current_stream().wait_stream(stream)
            self._d_hidden = torch.zeros_like(hidden)
            self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._forward, pool=pool):
                self._hidden = forward()
            with torch.cuda.graph(self._backward, pool=pool):
                self._hidden.backward(self._d_hidden)
        self._hidden = self._hidden.detach()
        self._angles = chunk.rotary_pos_emb.angles

    def __call__(self, microbatch: Microbatch) -> Tensor:
        """See `Graphs.run`."""
        self._load(microbatch)
        hidden: Tensor = _Replay.apply(self._anchor, self)
        return hidden

    def _load(self, microbatch: Microbatch) -> None:
        full = fill(microbatch, self.room)
        layout = self._layout
        contents = [
            (self._tokens, full.tokens),
            (self._positions, full.positions),
            (layout.query_ends, ends(full.segment_lengths)),
            (layout.key_ends, ends(count_keys(full))),
        ]
        if layout.key_index is not None:
            contents.append((layout.key_index, padded(index_keys(full), self.room.num_keys)))
        for buffer, array in contents:
            buffer.copy_(torch.from_numpy(array).pin_memory(), non_blocking=True)

    def replay_forward(self) -> Tensor:
        """-> the buffer of hidden states."""
        self._forward.replay()
        return self._hidden.detach()  # an alias: autograd marks what a function returns

    def replay_backward(self, d_hidden: Tensor) -> None:
        """Adds to the adapter's gradient."""
        self._d_hidden.copy_(d_hidden)
        self._backward.replay()


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, graph: _Graph) -> Tensor:
        ctx.graph = graph
        return graph.replay_forward()

    @staticmethod
    def backward(ctx: Any, d_hidden: Tensor) -> tuple[None, None]:
        ctx.graph.replay_backward(d_hidden)
        return None, None
