"""What only a GPU shows of a refit: work that is recorded as a CUDA graph."""

from pathlib import Path

import pytest
import torch

from rlloop.refit.transports import make_writer
from rlloop.types import Transport

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]


@pytest.mark.parametrize("transport", ["cuda_ipc", "memory"])
def test_every_turn_sends_what_is_there_now(tmp_path: Path, transport: Transport) -> None:
    writer = make_writer(transport, "bfloat16", "rlloop-test")
    oracle = make_writer("disk", "bfloat16", "", tmp_path)  # on the CPU
    tensors: dict[str, torch.Tensor] = {}
    try:
        for turn in range(9):
            if turn % 5 == 0:  # others, elsewhere, of which B is a part of something larger
                down, up = torch.empty(3, 8, 4097, device="cuda"), torch.empty(3, 301, 16, device="cuda")
                tensors = {f"{number}.lora_A.weight": each for number, each in enumerate(down)}
                tensors |= {f"{number}.lora_B.weight": each[:, 4:12] for number, each in enumerate(up)}
            for tensor in tensors.values():
                tensor.normal_()
            there = {name: tensor.cpu() for name, tensor in tensors.items()}
            assert writer.write(tensors, 2.0).digest == oracle.write(there, 2.0).digest
    finally:
        writer.close()
