"""The `peft` trainer: transformers + PEFT LoRA in one rank process. This side is thin and imports no torch."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from rlloop.trainer.rank_trainer import RankArguments, RankTrainer
from rlloop.trainer.ranks import RankContext, RankSpec


def _build_rank(context: RankContext, *, arguments: RankArguments) -> object:
    """In the rank, the only process that imports torch."""
    from rlloop.trainer.peft_rank import PeftRank

    return PeftRank(context, arguments)


class PeftTrainer(RankTrainer):
    """For small machines: one process, one device, a GPU if there is one."""

    build_rank = staticmethod(_build_rank)

    def _specs(self, arguments: RankArguments, cores: frozenset[int] | None, log_path: Path | None) -> list[RankSpec]:
        return [RankSpec(partial(self.build_rank, arguments=arguments), cores, log_path)]
