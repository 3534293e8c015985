"""The `megatron` trainer: LoRA on Megatron-Bridge, over tensor-, pipeline- and data-parallel ranks. Imports no torch.

parallel   groups of ranks              model      Hugging Face name -> Megatron model
lora       linear layers                layer      the transformer layer
adapter    one adapter's buffers        schedule   microbatches through the pipeline
graph      CUDA graphs of all layers    trace      spans of each rank in events.jsonl
compat     what upstream lacks          rank       the Trainer's methods, in each rank
"""

from __future__ import annotations

import json
import socket
from functools import partial
from pathlib import Path

from rlloop.config import MegatronSettings
from rlloop.errors import ConfigError
from rlloop.trainer.rank_trainer import RankArguments, RankTrainer
from rlloop.trainer.ranks import RankContext, RankSpec


class MegatronTrainer(RankTrainer):
    """For one or many GPUs of a host, or, with gloo, the cores of a CPU. `settings.megatron` says how the model is divided."""

    def _specs(self, arguments: RankArguments, cores: frozenset[int] | None, log_path: Path | None) -> list[RankSpec]:
        layout = arguments.settings.megatron
        check_divisible(arguments.model, layout)
        factory = partial(
            _build, arguments=arguments, address=f"127.0.0.1:{_free_port()}", events_path=self._events.path
        )
        return [RankSpec(factory, part, log_path) for part in _divide(cores, layout.num_ranks)]


def check_divisible(model: str, settings: MegatronSettings) -> None:
    """Raise ConfigError where the ranks cannot share this model out; it reads the folder's config.json."""
    config = json.loads((Path(model) / "config.json").read_text())
    tensor, pipeline = "--trainer.megatron.tensor-parallel", "--trainer.megatron.pipeline-parallel"
    wanted = [
        (tensor, settings.tensor_parallel, "num_attention_heads", "attention heads"),
        (tensor, settings.tensor_parallel, "num_key_value_heads", "key-value heads"),
        (tensor, settings.tensor_parallel, "intermediate_size", "intermediate features"),
        (tensor, settings.tensor_parallel, "vocab_size", "vocabulary entries"),
        (pipeline, settings.pipeline_parallel, "num_hidden_layers", "layers"),
    ]
    for flag, size, key, what in wanted:
        count = config.get(key) or (config.get("num_attention_heads") if key == "num_key_value_heads" else None)
        if count is None:
            raise ConfigError(
                f"--trainer.kind megatron: expected a dense decoder, whose config.json has {key}, got {model}; "
                "use --trainer.kind peft"
            )
        if count % size:
            raise ConfigError(f"{flag} {size}: expected a divisor of the model's {count} {what}")
    per_stage = config["num_hidden_layers"] // settings.pipeline_parallel
    if per_stage % settings.virtual_stages:
        raise ConfigError(
            f"--trainer.megatron.virtual-stages {settings.virtual_stages}: expected a divisor of the {per_stage} layers of "
            f"a stage (the model's {config['num_hidden_layers']} layers / pipeline-parallel {settings.pipeline_parallel})"
        )


def _divide(cores: frozenset[int] | None, num_ranks: int) -> list[frozenset[int] | None]:
    """Each rank's cores; ranks share them where there are fewer."""
    if cores is None:
        return [None] * num_ranks
    ordered = sorted(cores)
    return [frozenset(ordered[rank::num_ranks] or ordered[rank % len(ordered) :][:1]) for rank in range(num_ranks)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _build(context: RankContext, *, arguments: RankArguments, address: str, events_path: Path | None) -> object:
    """Runs in the rank."""
    from rlloop.trainer.megatron.rank import MegatronRank

    return MegatronRank(context, arguments, address, events_path)
