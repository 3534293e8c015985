"""A stand-in for the CUDA calls that Megatron makes, so that it runs on a CPU with gloo.

`install()` comes before the first model is built, and never where there is a GPU. It is process-wide, and
`torch.cuda.is_available()` stays False.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

_CPU = torch.device("cpu")
_FACTORIES = (
    *("tensor", "zeros", "ones", "empty", "full", "arange", "as_tensor"),
    *("zeros_like", "empty_like", "ones_like", "rand", "randn"),
)


class _Stream:
    """A stream and an event in one: on a CPU everything has happened when a call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    wait_stream = wait_event = synchronize = record = wait = _nothing

    def record_event(self, event: _Stream | None = None) -> _Stream:
        """The event, or itself."""
        return event or self

    def query(self) -> bool:
        """Whether all is done."""
        return True


def install() -> None:
    """Raises RuntimeError where there is a GPU."""
    if torch.cuda.is_available():
        raise RuntimeError("this machine has a GPU: it needs no stand-in for CUDA")
    if getattr(torch.cuda, "_rlloop_stand_in", False):
        return
    cuda: Any = torch.cuda
    cuda._rlloop_stand_in = True
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    cuda.current_device = _returns(_CPU)  # Megatron hands it to `device=`
    cuda.Stream = cuda.Event = _Stream
    for name in ("set_device", "synchronize", "empty_cache", "_lazy_call"):
        setattr(cuda, name, _returns(None))
    for name in ("current_stream", "default_stream"):
        setattr(cuda, name, _returns(_Stream()))
    for name in ("range_push", "range_pop"):
        setattr(cuda.nvtx, name, _returns(None))
    cuda.stream = lambda *args, **kwargs: nullcontext()
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()

    from megatron.core.tensor_parallel import random

    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron names the device as text: `torch.zeros(..., device="cuda")`."""

    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return call


def _returns(value: Any) -> Callable[..., Any]:
    """A new function for each name: torch.compile refuses one that stands for two of torch's."""
    return lambda *args, **kwargs: value
