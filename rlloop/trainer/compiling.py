"""Small functions, compiled where that pays."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


def on_device(function: Callable[..., Any], tensor: Tensor) -> Callable[..., Any]:
    """Compiled on a GPU, where it would read and write memory for each operation; on a CPU as it is, where compiling takes longer
    than it saves."""
    return _compiled(function) if tensor.is_cuda else function


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # Kinds of calls, beyond which it runs eagerly; by size and place in a pipeline they come near eight. Here, for newer torch
    # versions have it for each thread, and backward passes have their own.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function)
