"""The `megatron` trainer: LoRA on Megatron-Bridge, over tensor-, pipeline- and data-parallel ranks. Imports no torch.

parallel   groups of ranks              model      Hugging Face name -> Megatron model
lora       linear layers                layer      the transformer layer
adapter    one adapter's buffers        schedule   microbatches through the pipeline
graph      CUDA graphs of all layers    trace      spans of each rank in events.jsonl
stages     what each rank gets          compat     what upstream lacks
rank       the Trainer's methods, in each rank
"""

from __future__ import annotations

import socket
from functools import partial
from pathlib import Path

from rlloop.placement import divide
from rlloop.trainer.megatron.stages import check_divisible
from rlloop.trainer.rank_trainer import RankArguments, RankTrainer
from rlloop.trainer.ranks import RankContext, RankSpec


def _build_rank(context: RankContext, *, arguments: RankArguments, address: str, events_path: Path | None) -> object:
    """In the rank."""
    from rlloop.trainer.megatron.rank import MegatronRank

    return MegatronRank(context, arguments, address, events_path)


class MegatronTrainer(RankTrainer):
    """For one or many GPUs of a host, or, with gloo, the cores of a CPU. `settings.megatron` says how the model is divided."""

    build_rank = staticmethod(_build_rank)

    def _specs(self, arguments: RankArguments, cores: frozenset[int] | None, log_path: Path | None) -> list[RankSpec]:
        layout = arguments.settings.megatron
        check_divisible(arguments.model, layout)
        address = f"127.0.0.1:{_free_port()}"
        factory = partial(self.build_rank, arguments=arguments, address=address, events_path=self._events.path)
        return [RankSpec(factory, part, log_path) for part in divide(cores, layout.num_ranks)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
