"""Rows of a dataset, from files or from what the package `datasets` finds: for environments and for supervised training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlloop.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset

FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_rows(path: str | Sequence[str], name: str | None = None, split: str = "train") -> Dataset:
    """Those of a JSON, CSV or Parquet file, of a pattern or a list of them, or of what `datasets.load_dataset` takes.

    Raises ConfigError when they cannot be loaded, and when they have tools: prompts are not rendered with those.
    """
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ConfigError("datasets is not installed: pip install 'rlloop[datasets]'") from error
    files = [path] if isinstance(path, str) else path
    kind = FORMATS.get(Path(files[0]).suffix) if files else None
    if kind is None and not isinstance(path, str):
        raise ConfigError(f"expected a list of {', '.join(FORMATS)} files, got {path}")
    try:
        rows: Dataset = (
            load_dataset(kind, data_files=path, split=split) if kind else load_dataset(path, name, split=split)
        )
    except StopIteration as error:
        raise ConfigError(f"{path}: expected rows, got an empty file") from error
    except Exception as error:  # of many kinds, from a missing file to a server's
        cause = error.__cause__ or error
        raise ConfigError(
            f"{path} cannot be loaded: {type(cause).__name__}: {cause}. It is a JSON, CSV or Parquet file, or what "
            "datasets.load_dataset takes, with its name and split"
        ) from error
    if "tools" in rows.column_names and any(rows["tools"]):
        raise ConfigError(f"{path}: expected no tools, which prompts are not rendered with; remove the column")
    return rows
