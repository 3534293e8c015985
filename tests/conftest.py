from pathlib import Path
from typing import Any

import pytest

from rlloop.models import SMOLLM2, resolve_model


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow files first, so that two processes end at about the same time."""

    def seconds(item: pytest.Item) -> int:
        timeout = item.get_closest_marker("timeout")
        return int(timeout.args[0]) if timeout else 0

    items.sort(key=seconds, reverse=True)


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Loop code runs on both; a test of real vLLM parametrizes this with asyncio alone."""
    return str(request.param)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder in float32; its first use on a machine converts it."""
    return resolve_model(SMOLLM2)


@pytest.fixture(scope="session")
def tiny_llama(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with SmolLM2's tokenizer, in float32: vLLM and the trainer load it in no time."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,  # one that vLLM's attention on CPUs supports
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,  # far from uniform
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
