"""What only a GPU shows of a refit: work that is recorded as a CUDA graph."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from rlloop.refit.arrivals import Arrivals
from rlloop.refit.digest import digest
from rlloop.refit.transports import Reader, make_writer
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


_READERS: list[Reader] = []
"""Of the process that reads."""


def _digest_on_the_second_gpu(ticket: dict[str, Any]) -> str:
    if not _READERS:
        _READERS.append(Reader(torch.device("cuda", 1)))
    with torch.cuda.stream(torch.cuda.Stream(1)):  # as an engine's worker does
        return digest(_READERS[0].read(ticket), ticket["manifest"])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL wants a GPU for each rank")
def test_nccl_brings_what_was_sent() -> None:
    writer = make_writer("broadcast", "bfloat16", "")
    with ProcessPoolExecutor(1, get_context("spawn")) as reader:
        for size in (4097, 4097, 17, 100_000):
            shapes = {"0.lora_A.weight": (8, size), "0.lora_B.weight": (301, 8)}
            ticket = writer.write({name: torch.randn(shape, device="cuda") for name, shape in shapes.items()}, 2.0)
            assert reader.submit(_digest_on_the_second_gpu, asdict(ticket)).result(60) == ticket.digest
    writer.close()


_ARRIVALS: list[Arrivals] = []


def _take_beside_a_forward_pass(ticket: dict[str, Any]) -> tuple[str, bool]:
    """On the second GPU; -> the digest of what came, and whether the pass was still running when it had come."""
    device, forward_pass = torch.device("cuda", 1), torch.cuda.Stream(1)
    torch.cuda.set_device(device)
    if not _ARRIVALS:
        _ARRIVALS.append(Arrivals(device, torch.bfloat16))
    with torch.cuda.stream(forward_pass):
        torch.cuda._sleep(10**9)  # cycles: half a second
    with _ARRIVALS[0].stream():
        flat = _ARRIVALS[0].take(ticket)
        _ARRIVALS[0].now()
        is_running = not forward_pass.query()
        return digest(flat, ticket["manifest"]), is_running


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="from one GPU to another")
def test_what_comes_from_another_gpu_waits_for_no_forward_pass() -> None:
    writer = make_writer("cuda_ipc", "bfloat16", "")
    with ProcessPoolExecutor(1, get_context("spawn")) as worker:
        for turn in range(3):
            tensors = {"0.lora_A.weight": torch.randn(32, 10**6), "0.lora_B.weight": torch.randn(10**6, 32)}
            ticket = writer.write({name: each.cuda() for name, each in tensors.items()}, 2.0)
            found, was_running = worker.submit(_take_beside_a_forward_pass, asdict(ticket)).result(60)
            assert found == ticket.digest
            assert was_running or turn == 0  # which maps the memory and allocates its own
    writer.close()
