"""Who learns. The primitives name the adapter that they act on and know no algorithm: a loss is a function that is passed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from rlloop.types import (
    AdamConfig,
    AdapterTicket,
    FloatArray,
    LoraConfig,
    Metrics,
    OptimResult,
    Sample,
    WeightsTicket,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Head = Literal["policy", "value"]


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """The tokens of one microbatch that carry loss, flat. All tensors are [N], on the trainer's device, in fp32 if not said.

    A loss sees exactly these tokens, in the order of the samples."""

    advantages: Tensor
    loss_weights: Tensor
    rollout_logprobs: Tensor
    old_logprobs: Tensor | None
    """The trainer's before the update; None where the update is one optimizer step, for then they equal `logprobs`."""
    ref_logprobs: Tensor | None
    sample_index: Tensor
    """Which of the microbatch's samples each token belongs to, counted from 0; int64. A sample is never cut in two."""
    entropy: Tensor | None
    """Of the policy's distribution at each token, without gradient; None for a value adapter."""
    old_values: Tensor | None = None
    """Before the update."""
    returns: Tensor | None = None
    """What values should be."""
    staleness: Tensor | None = None
    """Versions that the trainer's policy before the update is ahead of the one that sampled."""


Loss: TypeAlias = "Callable[[Tensor, TokenBatch], tuple[Tensor, Mapping[str, Tensor]]]"
"""(logprobs [N] under gradient, tokens) -> (scalar, metrics [N] per token); a value adapter's gets values for logprobs.

The scalar is summed over microbatches, so weight each token with `tokens.loss_weights`. Per-token metrics come back as
`<name>/mean` and `<name>/max` over the batch. The function is sent to the ranks by reference: define it in a module (or
use functools.partial of one)."""


class AdapterWriter(Protocol):
    """How an exported adapter leaves the trainer's process. Lives in the rank; made by the caller, pickled to it."""

    def write(self, tensors: Mapping[str, torch.Tensor], scale: float) -> AdapterTicket:
        """Put the tensors (PEFT's names) where an engine finds them, B multiplied by `scale`."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


class WeightsWriter(Protocol):
    """How whole weights leave the trainer's process. Lives in the rank; made by the caller, pickled to it."""

    @property
    def location(self) -> str:
        """Where engines can ask for them."""
        ...

    def listen(self) -> None:
        """From here on they can."""
        ...

    def send(self, weights: Iterator[tuple[str, torch.Tensor]], check_interrupt: Callable[[], None]) -> None:
        """Hand all of them, by Hugging Face's names, to those who ask."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


class Trainer(Protocol):
    """Asynchronous; runs in rank processes of its own. A rank that dies or raises makes the call raise TrainerError."""

    async def create_adapter(self, name: str, lora: LoraConfig, head: Head = "policy") -> None:
        """A new adapter (B = 0, so the model is the base) with an optimizer of its own.

        With head `value` it has a scalar head of its own, zero at first, in place of the vocabulary: the value of a token
        is that of the hidden state that the token is sampled from. It has no logprobs, and is not exported.
        """
        ...

    async def remove_adapter(self, name: str) -> None:
        """Forget an adapter and its optimizer, if it is there."""
        ...

    async def forward_backward(self, name: str, samples: Sequence[Sample], loss: Loss) -> Metrics:
        """Add the gradient of the loss over the samples, in microbatches under the token budget, to the adapter's."""
        ...

    async def optim_step(self, name: str, adam: AdamConfig) -> OptimResult:
        """Clip, step, zero the gradient. A non-finite loss or gradient leaves adapter and optimizer as they were.

        Raises NonFiniteError after several of those in a row.
        """
        ...

    async def logprobs(self, name: str | None, samples: Sequence[Sample]) -> list[FloatArray]:
        """Per sample [T], 0 where `loss_mask` is false; `None` names the frozen base (the reference policy)."""
        ...

    async def values(self, name: str, samples: Sequence[Sample]) -> list[FloatArray]:
        """Per sample [T] of a value adapter, 0 where `loss_mask` is false."""
        ...

    async def export_adapter(self, name: str) -> AdapterTicket:
        """Hand the adapter's present weights to the transport."""
        ...

    def sending_weights(self, name: str) -> AbstractAsyncContextManager[WeightsTicket]:
        """While the block runs, the weights with the adapter merged into them are handed to engines; at its end all have them.

        What the trainer raises goes before what the block raises, for that is a consequence, but where an engine has died.
        """
        ...

    async def save(self, name: str, folder: Path) -> None:
        """Write `adapter/` (PEFT's format) and `state/` (optimizer, random state) into the folder, at the last optimizer step.

        A forward_backward that is running on one rank ends, and its gradient is discarded; several ranks first go on to its end.
        """
        ...

    async def load(self, name: str, folder: Path) -> None:
        """Restore what `save` wrote into an adapter that exists."""
        ...
