"""What the tests of the megatron trainer send to its ranks, which import it by this name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from rlloop.errors import RefitError
from rlloop.trainer import TokenBatch
from rlloop.trainer.ranks import RankContext, Ranks, RankSpec
from rlloop.types import Sample


class Writer:
    """Returns what it is given."""

    def write(self, tensors: Mapping[str, Tensor], scale: float) -> Any:
        return {name: tensor.clone().cpu() for name, tensor in tensors.items()}

    def close(self) -> None:
        pass


class HangingUp:
    """An engine that wants no weights but the first."""

    def send(self, weights: Iterator[tuple[str, Tensor]], check_interrupt: Callable[[], None]) -> None:
        next(weights)
        raise RefitError("the engine hung up")

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
        self._rank = None
        torch.compiler.reset()  # or it would compile for the sizes of every model that was there
        if torch.distributed.is_initialized():
            from rlloop.trainer.megatron.parallel import parallel_state

            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()
        self._context.num_ranks = len(specs)
        if self._context.rank < len(specs):
            self._rank = specs[self._context.rank].factory(self._context)

    def close(self) -> None:
        pass

    def num_body(self) -> int | None:
        """Weights that a token is multiplied with in the layers."""
        return None if self._rank is None else self._rank._num_body

    def __getattr__(self, name: str) -> Any:
        return (lambda *args: None) if self._rank is None else getattr(self._rank, name)


def with_megatrons_layer(context: RankContext, **arguments: Any) -> Any:
    """A rank of the megatron trainer with Megatron-Core's own transformer layer."""
    from rlloop.trainer.megatron import MegatronTrainer, model

    usual = model.FastLayer
    model.FastLayer = model.TransformerLayer
    rank: Any = MegatronTrainer.build_rank(context, **arguments)
    model.FastLayer = usual
    assert type(rank._model.chunks[0].decoder.layers[0]).__name__ == "TransformerLayer"
    return rank


class ShowingRank:
    """A rank of the megatron trainer with what no Trainer has yet."""

    def __init__(self, context: RankContext, **arguments: Any) -> None:
        from rlloop.trainer.megatron import MegatronTrainer

        self._rank: Any = MegatronTrainer.build_rank(context, **arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rank, name)

    def count_compiled(self, name: str, batches: Sequence[Sequence[Sample]]) -> int:
        """Functions that are compiled, as they would be on a GPU, in batches after a warm-up."""
        from rlloop.trainer import head
        from rlloop.trainer.megatron import layer

        compiled = cache(partial(torch.compile, backend="eager"))
        found = torch._dynamo.utils.counters["stats"]
        with pytest.MonkeyPatch.context() as patch:
            for module in (layer, head):
                patch.setattr(module, "on_device", lambda function, _: compiled(function))
            self._rank.warm_up(name)
            before = found["unique_graphs"]
            assert before > 5
            for samples in batches:
                self._rank.logprobs(name, samples)
                self._rank.forward_backward(name, samples, surrogate)
        return found["unique_graphs"] - before

    def with_dropout(self) -> list[dict[str, tuple[Tensor, Tensor]]]:
        """Of a column layer and a row layer: what it computes, and what autograd makes of the same formula and mask."""
        from rlloop.trainer.megatron.lora import LoraLinear, LoraWeights

        found = []
        LoraLinear.is_training = True
        for adaptable in self._rank._model.layers[:2]:
            layer, weight = adaptable.layer, adaptable.layer.weight.detach()
            bias = 0 if layer.bias is None else layer.bias.detach()
            x, a, b = (torch.randn(*s) for s in ((7, weight.shape[1]), (3, weight.shape[1]), (len(weight), 3)))
            lora = LoraWeights(
                a, b, torch.zeros_like(a), torch.zeros_like(b), dropout=0.4, gain=None, gain_gradient=None
            )
            wanted = [tensor.clone().requires_grad_() for tensor in (x, a, b)]
            x.requires_grad_()
            layer.set_lora(lora)
            torch.manual_seed(0)
            y = layer.product(x)
            y.square().sum().backward()
            torch.manual_seed(0)
            kept = torch.native_dropout(x.detach(), 0.4, True)[1]
            expected = wanted[0] @ weight.t() + bias + wanted[0] * kept / 0.6 @ wanted[1].t() @ wanted[2].t()
            expected.square().sum().backward()
            layer.set_lora(None)
            pairs = {
                "y": (y.detach(), expected.detach()),
                "dx": (x.grad, wanted[0].grad),
                "da": (lora.a_gradient, wanted[1].grad),
                "db": (lora.b_gradient, wanted[2].grad),
            }
            found.append(pairs)
        LoraLinear.is_training = False
        return found

    def send_to_nobody(self, name: str) -> None:
        """The engine hangs up at the first weight."""
        self._rank._sender = HangingUp()
        self._rank.send_weights(name)

    def merged(self, name: str) -> dict[str, Tensor]:
        return {key: tensor.cpu().clone() for key, tensor in self._rank.export_weights(name)}
