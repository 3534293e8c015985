"""The `peft` trainer: transformers + PEFT LoRA in one rank process. This side is thin and imports no torch."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from rlloop.trainer.rank_trainer import RankArguments, RankTrainer
from rlloop.trainer.ranks import RankContext, RankSpec


class PeftTrainer(RankTrainer):
    """For small machines: one process, one device, a GPU if there is one."""

    def _specs(self, arguments: RankArguments, cores: frozenset[int] | None, log_path: Path | None) -> list[RankSpec]:
        return [RankSpec(partial(_build, arguments=arguments), cores, log_path)]


def _build(context: RankContext, *, arguments: RankArguments) -> object:
    """Runs in the rank, the only process that imports torch."""
    from rlloop.trainer.peft_rank import PeftRank

    return PeftRank(context, arguments)
