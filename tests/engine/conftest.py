import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def vllms_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """vLLM's module that reads the blocks of LoRA kernels, and has read none."""
    from vllm.lora.ops.triton_ops import utils

    def forget() -> None:
        for cached in (utils.load_lora_op_config, utils.get_lora_op_configs):
            cached.cache_clear()

    monkeypatch.delenv("VLLM_TUNED_CONFIG_FOLDER", raising=False)
    forget()
    yield utils
    forget()
