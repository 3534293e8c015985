"""What the tests of the megatron trainer send to its ranks, which import it by this name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rlloop.trainer import TokenBatch
from rlloop.trainer.ranks import RankContext


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


class Rank:
    """A rank with what no Trainer has yet; `layer` is the transformer layer that it uses."""

    def __init__(self, context: RankContext, *, layer: str = "FastLayer", **arguments: Any) -> None:
        from rlloop.trainer.megatron import model
        from rlloop.trainer.megatron.rank import MegatronRank

        model.FastLayer = getattr(model, layer)
        self._rank = MegatronRank(context, **arguments)
        assert type(self._rank._model.chunks[0].decoder.layers[0]).__name__ == layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rank, name)

    def merged(self, name: str) -> dict[str, Tensor]:
        return {key: tensor.cpu().clone() for key, tensor in self._rank.export_weights(name)}
