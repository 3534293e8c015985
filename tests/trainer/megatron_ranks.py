"""What the tests of the megatron trainer send to its ranks, which import it by this name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlloop.trainer import TokenBatch
from rlloop.trainer.ranks import RankContext, Ranks, RankSpec


class Writer:
    """Returns what it is given."""

    def write(self, tensors: Mapping[str, Tensor], scale: float) -> Any:
        return {name: tensor.clone().cpu() for name, tensor in tensors.items()}

    def close(self) -> None:
        pass


def surrogate(logprobs: Tensor, tokens: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
    ratio = (logprobs - tokens.rollout_logprobs).exp()
    return -(tokens.loss_weights * ratio * tokens.advantages).sum(), {"ratio": ratio}


def infinite(logprobs: Tensor, tokens: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
    return logprobs.sum() * torch.inf, {}


class BorrowedRanks:
    """A trainer's ranks, in processes that outlive it: starting one takes longer than all that the trainer does."""

    def __init__(self, ranks: Ranks, specs: Sequence[RankSpec]) -> None:
        self._ranks = ranks
        self._specs = specs
        self.call, self.interrupt = ranks.call, ranks.interrupt

    async def __aenter__(self) -> None:
        await self._ranks.call("build", self._specs)

    async def close(self) -> None:
        pass


class SuccessiveRank:
    """What runs in such a process: the rank of one trainer after another, or nothing where the trainer has fewer."""

    def __init__(self, context: RankContext) -> None:
        self._context = context
        self._rank: Any = None

    def build(self, specs: Sequence[RankSpec]) -> None:
        from rlloop.trainer.megatron.parallel import parallel_state

        self._rank = None
        torch.compiler.reset()  # or it would compile for the sizes of every model that was there
        parallel_state.destroy_model_parallel()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        self._context.num_ranks = len(specs)
        if self._context.rank < len(specs):
            self._rank = specs[self._context.rank].factory(self._context)

    def close(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return (lambda *args: None) if self._rank is None else getattr(self._rank, name)


class ShowingRank:
    """A rank of the megatron trainer with what no Trainer has yet; `layer` is the transformer layer that it uses."""

    def __init__(self, context: RankContext, *, layer: str, **arguments: Any) -> None:
        from rlloop.trainer.megatron import model
        from rlloop.trainer.megatron.rank import MegatronRank

        usual = model.FastLayer
        model.FastLayer = getattr(model, layer)
        self._rank = MegatronRank(context, **arguments)
        model.FastLayer = usual
        assert type(self._rank._model.chunks[0].decoder.layers[0]).__name__ == layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rank, name)

    def merged(self, name: str) -> dict[str, Tensor]:
        return {key: tensor.cpu().clone() for key, tensor in self._rank.export_weights(name)}
