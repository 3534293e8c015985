"""The adapters of a run on a trainer that others use, too."""

import anyio

from rlloop.adapters import create_adapters
from rlloop.trainer import Head
from rlloop.trainer.fake import FakeTrainer
from rlloop.types import LoraConfig


class SlowTrainer(FakeTrainer):
    """Its ranks go on with what is cancelled."""

    async def create_adapter(self, name: str, lora: LoraConfig, head: Head = "policy") -> None:
        await super().create_adapter(name, lora, head)
        if name == "critic":
            await anyio.sleep_forever()


def test_an_adapter_whose_creation_is_cancelled_is_among_those_that_are_there(anyio_backend: str) -> None:
    trainer, created = SlowTrainer(), list[str]()

    async def main() -> None:
        adapters: dict[str, tuple[LoraConfig, Head]] = {
            name: (LoraConfig(), "policy") for name in ("policy", "critic", "never")
        }
        with anyio.move_on_after(0.1):
            await create_adapters(trainer, adapters, None, created=created)
        for name in (*created, "never"):  # one that is not there may be removed
            await trainer.remove_adapter(name)

    anyio.run(main, backend=anyio_backend)
    assert created == ["policy", "critic"]
    assert not trainer.steps
