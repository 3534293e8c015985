"""What every trainer's rank does around an optimizer step."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

from rlloop.errors import NonFiniteError, TrainerError
from rlloop.trainer import Head
from rlloop.trainer.tokens import Summary
from rlloop.types import Metrics


@contextmanager
def gradient_discarded_on_error(discard: Callable[[], None]) -> Iterator[None]:
    """Whatever is raised within, what of the gradient is there already must not count. Says what helps against a lack of
    memory, as TrainerError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        discard()
        raise TrainerError(
            f"lower trainer.max_tokens_per_microbatch: the trainer ran out of memory ({error})"
        ) from error
    except Exception:
        discard()
        raise


def throughput(summary: Summary, seconds: float, *, num_body: int, num_head: int, peak_flops: float) -> Metrics:
    """Of one forward_backward, by the weights of a model's layers and of its head."""
    # Forward, and backward to the activations only: 2 x 2 operations for each weight and token.
    flops = 4 * (num_body * summary.num_computed_tokens + num_head * summary.num_tokens)
    return {"forward_backward_seconds": seconds, "mfu": flops / seconds / peak_flops}


class HasHead(Protocol):
    """An adapter, whatever a trainer makes of it."""

    @property
    def head(self) -> Head:
        """Its own."""
        ...


AdapterT = TypeVar("AdapterT", bound=HasHead)


def get_adapter(adapters: Mapping[str, AdapterT], name: str, head: Head | None) -> AdapterT:
    """Raises TrainerError if there is none of that name, or one with another head; None: either will do."""
    if name not in adapters:
        raise TrainerError(f"no adapter is named {name!r}; there are: {', '.join(adapters) or 'none'}")
    adapter = adapters[name]
    if head not in (None, adapter.head):
        raise TrainerError(f"adapter {name!r} has a {adapter.head} head; this call is for adapters with a {head} head")
    return adapter


class SkippedSteps:
    """Counts each adapter's steps that were skipped in a row for a non-finite loss or gradient."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._in_a_row: Counter[str] = Counter()

    def forget(self, name: str) -> None:
        """The adapter is gone."""
        self._in_a_row.pop(name, None)

    def count(self, name: str, skipped: bool) -> None:
        """Raise NonFiniteError when there were `limit` of them."""
        self._in_a_row[name] = self._in_a_row[name] + 1 if skipped else 0
        if self._in_a_row[name] >= self._limit:
            raise NonFiniteError(
                f"{self._in_a_row[name]} steps in a row had a non-finite loss or gradient (adapter {name!r}); "
                "lower optim.lr, or look for a reward or advantage that is not finite"
            )


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of one large matrix product: what `mfu` is a fraction of."""
    size = 1024 if device.type == "cpu" else 8192
    matrix = torch.randn(size, size, device=device).to(dtype)
    best = math.inf
    for _ in range(4):
        started = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
