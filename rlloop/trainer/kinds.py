"""`trainer.kind` -> the class, which imports no torch here."""

from __future__ import annotations

import importlib.util

from rlloop.errors import ConfigError
from rlloop.trainer.megatron import MegatronTrainer
from rlloop.trainer.peft import PeftTrainer
from rlloop.trainer.rank_trainer import RankTrainer

_KINDS: dict[str, type[RankTrainer]] = {"peft": PeftTrainer, "megatron": MegatronTrainer}


def trainer_class(kind: str) -> type[RankTrainer]:
    """Raises ConfigError when its packages are missing."""
    if kind == "megatron" and not _has("megatron.bridge"):
        raise ConfigError(
            "--trainer.kind megatron: expected Megatron-Bridge to be installed, found none: pip install --no-deps "
            "--ignore-requires-python megatron-core==0.19.2 megatron-bridge==0.6.2 omegaconf==2.4.0"
        )
    return _KINDS[kind]


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of what it lies in
        return False
