"""The adapters that a run trains, and where its checkpoints have them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeAlias

from anyio import get_cancelled_exc_class

from rlloop.checkpoint import Checkpoint
from rlloop.trainer import Head, Trainer
from rlloop.types import LoraConfig

POLICY = "policy"
"""The adapter whose versions the engine serves."""

Adapters: TypeAlias = Mapping[str, tuple[LoraConfig, Head]]
"""By name."""


async def create_adapters(
    trainer: Trainer,
    adapters: Adapters,
    checkpoint: Checkpoint | None,
    begin_with: Path | None = None,
    created: list[str] | None = None,
) -> None:
    """With the weights that they have in the checkpoint; without one, the policy's are those of the adapter `begin_with`.

    `created` gets the name of each that is there, or will be.
    """
    created = [] if created is None else created
    for name, (lora, head) in adapters.items():
        try:
            await trainer.create_adapter(name, lora, head)
        except get_cancelled_exc_class():
            created.append(name)  # the ranks go on with it
            raise
        created.append(name)
        if checkpoint is not None:
            await trainer.load(name, adapter_folder(checkpoint.folder, name))
        elif begin_with is not None and name == POLICY:
            with _as_checkpoint(begin_with) as folder:
                await trainer.load(name, folder)


@contextmanager
def _as_checkpoint(adapter: Path) -> Iterator[Path]:
    """A checkpoint's folder with this adapter, and without the state of its optimizer."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "adapter").symlink_to(adapter.resolve())
        yield Path(folder)


def adapter_folder(checkpoint: Path, name: str) -> Path:
    """Where a checkpoint has the adapter and the state of its optimizer."""
    return checkpoint if name == POLICY else checkpoint / name
