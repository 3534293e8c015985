"""Rows of datasets: where they are found, and what is said where they are not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from rlloop.errors import ConfigError
from rlloop.rows import load_rows


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory, with some files."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text("text\none\ntwo\n")
    Path("a.jsonl").write_text(json.dumps({"text": "three"}))
    Path("b.jsonl").write_text(json.dumps({"text": "four"}))
    Path("empty.jsonl").touch()
    Path("tools.jsonl").write_text(json.dumps({"text": "five", "tools": [{"name": "calculator"}]}))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("rows.csv", ["one", "two"]),
        ("a.jsonl", ["three"]),
        ("?.jsonl", ["three", "four"]),
        (["b.jsonl", "a.jsonl"], ["four", "three"]),
    ],
)
def test_files_are_found(path: str | list[str], expected: list[str]) -> None:
    assert list(load_rows(path)["text"]) == expected


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.jsonl", "missing.jsonl cannot be loaded: .* with its name and split"),
        ("empty.jsonl", "empty.jsonl: expected rows, got an empty file"),
        ("tools.jsonl", "tools.jsonl: expected no tools, which prompts are not rendered with"),
        (["someone/one", "someone/two"], "expected a list of .json, .* files"),
        ([], "expected a list of .json, .* files"),
    ],
)
def test_what_cannot_be_loaded_is_explained(path: str | list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_rows(path)


def test_a_split_that_is_not_there_is_explained() -> None:
    with pytest.raises(ConfigError, match=r"rows\.csv cannot be loaded"):
        load_rows("rows.csv", split="test")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'rlloop\[datasets\]'"):
        load_rows("rows.csv")
