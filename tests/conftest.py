from pathlib import Path

import pytest

from rlloop.models import SMOLLM2, resolve_model


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Loop code runs on both; a test of real vLLM parametrizes this with asyncio alone."""
    return str(request.param)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder in float32; its first use on a machine converts it."""
    return Path(resolve_model(SMOLLM2))
