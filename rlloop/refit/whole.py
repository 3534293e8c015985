"""Whole weights as the trainer has them, in the place of the engine's own, between two forward passes.

The engine has no LoRA layers, and keeps nothing beside the weights that it computes with; what can be exported can be refitted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch

from rlloop.engine import vllm_compat
from rlloop.refit.stream import Named, WeightsReader


class Whole:
    """Of one worker."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        runner = worker.model_runner
        if runner.device.type != "cpu":
            check_plain(runner.get_model())
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
        with self._stream:
            weights = self._reader.read(self._stream)
            if self._device.type == "cpu":  # whose kernels read weights that are packed when all of a layer's have come
                self._worker.reload_weights(weights_iterator=((name, weight.clone()) for name, weight in weights))
            else:
                load_in_place(self._worker.model_runner.get_model(), weights)

    @property
    def num_bytes(self) -> int:
        """Of the version loaded last."""
        return self._reader.num_bytes


def load_in_place(model: Any, weights: Iterator[Named]) -> None:
    """Into the parameters that the kernels read, by vLLM's own loaders, which cut out this tensor-parallel rank's part.

    Raises ValueError where of some parameters nothing came, which the loaders do not mind.
    """
    loaded = model.load_weights(weights)
    if missing := {name for name, _ in model.named_parameters()} - loaded:
        raise ValueError(
            f"{len(missing)} weights of the engine's model did not come, for example {sorted(missing)[:3]}"
        )


def check_plain(model: torch.nn.Module) -> None:
    """Raises ValueError for a model of whose weights vLLM computes others after loading, which would stay those of version 0."""
    derived = {"MLAAttention", *vllm_compat.EXPERTS}
    for name, module in model.named_modules():
        if found := derived.intersection(kind.__name__ for kind in type(module).__mro__):
            kind = found.pop()
            raise ValueError(f"{name} is of {kind}, whose weights vLLM rearranges: use --refit.form adapter or merged")
