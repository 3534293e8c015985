import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from rlloop.types import Sample

sys.path.insert(0, str(Path(__file__).parent))  # of the ranks, too: they import what a test sends by its module's name

VOCABULARY = 97
MakeSamples = Callable[..., list[Sample]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of a tiny model cost more than they gain, the more so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of tiny random models: grouped-query attention, tied and untied heads, with and without biases."""
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    folders = {}
    for name, model_class, config in [
        ("llama", LlamaForCausalLM, LlamaConfig(**shape, tie_word_embeddings=True)),
        ("qwen2", Qwen2ForCausalLM, Qwen2Config(**shape, tie_word_embeddings=False)),
    ]:
        torch.manual_seed(0)
        folder: Path = tmp_path_factory.mktemp(name)
        model_class(config).save_pretrained(folder)
        folders[name] = str(folder)
    return folders


@pytest.fixture(scope="session")
def make_samples() -> MakeSamples:
    def make(num_groups: int = 3, group_size: int = 4, seed: int = 0) -> list[Sample]:
        """Prompts of 3 to 12 tokens, completions of 1 to 20; the second group has a turn of the environment inside."""
        generator = np.random.default_rng(seed)
        samples = []
        for group in range(num_groups):
            prompt = generator.integers(2, VOCABULARY, generator.integers(3, 13))
            for _ in range(group_size):
                completion = generator.integers(2, VOCABULARY, generator.integers(1, 21))
                tokens = np.concatenate([prompt, completion]).astype(np.int32)
                loss_mask = np.arange(len(tokens)) >= len(prompt)
                if group == 1:
                    loss_mask[len(prompt) + 3 : len(prompt) + 6] = False
                draw = generator.normal(size=(2, len(tokens)))
                samples.append(
                    Sample(
                        tokens=tokens,
                        loss_mask=loss_mask,
                        rollout_logprobs=np.where(loss_mask, draw[0] * 0.3 - 4.5, 0).astype(np.float32),
                        advantages=np.full(len(tokens), draw[1][0], dtype=np.float32),
                        loss_weights=np.full(len(tokens), 1 / 40, dtype=np.float32),
                        prompt_id=group,
                    )
                )
        return samples

    return make
