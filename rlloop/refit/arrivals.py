"""Adapters as they come to an engine's worker."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from rlloop.refit.transports import Reader


class Arrivals:
    """Each on the engine's device, as one flat tensor."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._reader = Reader(device)
        # A stream of its own, since nothing here waits for the forward pass that may be running.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._source: torch.cuda.Stream | None = None
        """On the other GPU, whence adapters come."""
        self._staged = torch.empty(0, dtype=dtype, device=device)

    def stream(self) -> AbstractContextManager[Any]:
        """Where work on them belongs that forward passes need not wait for."""
        return torch.cuda.stream(self._stream) if self._stream else nullcontext()

    def take(self, ticket: dict[str, Any]) -> torch.Tensor:
        """In one copy, not one for each tensor; valid until the next is sent. Raises ValueError on another dtype."""
        if f"torch.{ticket['dtype']}" != str(self._dtype):
            raise ValueError(f"the adapter came as {ticket['dtype']}, this engine computes in {self._dtype}")
        flat = self._reader.read(ticket)
        if flat.device == self._staged.device:
            return flat
        if self._staged.numel() != flat.numel():
            self._staged = torch.empty_like(flat, device=self._staged.device)
        with self._source_stream(flat.device):
            return self._staged.copy_(flat, non_blocking=True)

    def _source_stream(self, source: torch.device) -> AbstractContextManager[Any]:
        """Torch copies between GPUs on the source's current stream. By default that is CUDA's null stream, on which such a copy
        waits for all that either GPU has to do: for the forward pass that is running."""
        if source.type != "cuda":
            return nullcontext()
        if self._source is None or self._source.device != source:
            self._source = torch.cuda.Stream(source)
        return torch.cuda.stream(self._source)

    def now(self) -> float:
        """When all that is done, on the clock of `time.monotonic()`."""
        if self._stream:
            self._stream.synchronize()
        return time.monotonic()
