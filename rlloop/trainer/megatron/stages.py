"""What of a model each rank gets. Imports no torch: what cannot be shared out is refused before any process starts."""

from __future__ import annotations

import json
from pathlib import Path

from rlloop.config import MegatronSettings
from rlloop.errors import ConfigError


def check_divisible(model: str, settings: MegatronSettings) -> None:
    """Raise ConfigError where the ranks cannot share this model out; it reads the folder's config.json."""
    config = json.loads((Path(model) / "config.json").read_text())
    counts = {"num_key_value_heads": config.get("num_attention_heads"), **config}
    divided = {
        "num_attention_heads": "attention heads",
        "num_key_value_heads": "key-value heads",
        "intermediate_size": "intermediate features",
        "vocab_size": "vocabulary entries",
    }
    if missing := [key for key in ("num_hidden_layers", *divided) if not counts.get(key)]:
        raise ConfigError(
            f"--trainer.kind megatron: expected a decoder whose config.json has {missing[0]}, got {model}; "
            "use --trainer.kind peft"
        )
    num_layers, num_chunks = counts["num_hidden_layers"], settings.pipeline_parallel * settings.virtual_stages
    if num_layers < num_chunks:
        raise ConfigError(
            f"--trainer.megatron.pipeline-parallel {settings.pipeline_parallel} and virtual-stages "
            f"{settings.virtual_stages}: expected at least {num_chunks} layers, got {model} with {num_layers}"
        )
    size = settings.tensor_parallel
    for key, what in divided.items():
        if counts[key] % size:
            raise ConfigError(
                f"--trainer.megatron.tensor-parallel {size}: expected a divisor of the model's {counts[key]} {what}"
            )


def share_layers(num_layers: int, num_chunks: int, head_cost: float) -> list[int]:
    """How many layers each chunk gets, so that all take about as long: the last one computes the head, too, which costs as
    much as `head_cost` layers."""
    last = max(1, round((num_layers + head_cost) / num_chunks - head_cost))
    each, more = divmod(num_layers - last, num_chunks - 1)
    return [each + (index < more) for index in range(num_chunks - 1)] + [last]
