"""Whole weights as the trainer has them, in the place of the engine's own, between two forward passes.

The engine has no LoRA layers, and keeps nothing beside the weights that it computes with; what can be exported can be refitted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch

from rlloop.refit.stream import Named, WeightsReader


class Whole:
    """Of one worker."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        runner = worker.model_runner
        self._device: torch.device = runner.device
        self._reader = WeightsReader(runner.device)
        self._stream: Connection | None = None

    def load(self, version: int, ticket: dict[str, Any]) -> dict[str, Any]:
        """Ask for them; `swap` reads them."""
        started = time.monotonic()
        self._stream = self._reader.connect(ticket["location"])
        return {
            "digest": ticket["digest"],
            "different": None,
            "transfer_seconds": time.monotonic() - started,
            "load_seconds": 0.0,
            "verify_seconds": 0.0,
        }

    def swap(self) -> None:
        """Load each as it comes, checked. Raises ValueError where some of the model's did not come, RefitError where one did not
        come as it was sent: what the engine holds is a mixture then."""
        assert self._stream is not None
        weights = self._reader.read(self._stream)
        if self._device.type == "cpu":  # whose kernels read weights that are packed after loading
            self._worker.reload_weights(weights_iterator=weights)
            return
        load_in_place(self._worker.model_runner.get_model(), weights)

    @property
    def num_bytes(self) -> int:
        """Of the version loaded last."""
        return self._reader.num_bytes


def load_in_place(model: Any, weights: Iterator[Named]) -> None:
    """Into the parameters that the kernels read, by vLLM's own loaders, which cut out this tensor-parallel rank's part.

    Raises ValueError where some did not come, which the loaders do not mind.
    """
    loaded = model.load_weights(weights)
    if missing := {name for name, _ in model.named_parameters()} - loaded:
        raise ValueError(
            f"{len(missing)} weights of the engine's model did not come, for example {sorted(missing)[:3]}"
        )
