import os
import pickle
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from rlloop.errors import RefitError
from rlloop.refit.digest import digest
from rlloop.refit.slots import first_difference
from rlloop.refit.transports import SHARED_MEMORY, Reader, Writer
from rlloop.refit.transports import make_writer as make_any_writer
from rlloop.types import AdapterTicket, Transport

PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"


def adapter(rank: int = 4, scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return {
        f"{PREFIX}.lora_B.weight": torch.randn(6, rank, generator=generator) * scale,
        f"{PREFIX}.lora_A.weight": torch.randn(rank, 5, generator=generator) * scale,
    }


@pytest.fixture(params=["memory", "disk"])
def transport(request: pytest.FixtureRequest) -> Transport:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def segment() -> Iterator[str]:
    name = f"rlloop-test-{uuid.uuid4().hex}"
    yield name
    (SHARED_MEMORY / name).unlink(missing_ok=True)


def make_writer(transport: Transport, dtype: str, segment: str, folder: Path) -> Writer:
    return make_any_writer(transport, dtype, segment, folder / "refit")


def read(ticket: AdapterTicket, reader: Reader | None = None) -> dict[str, torch.Tensor]:
    flat = (reader or Reader(torch.device("cpu"))).read(asdict(ticket))
    pieces = flat.split([rows * columns for _, (rows, columns) in ticket.manifest])
    return {name: piece.view(shape) for (name, shape), piece in zip(ticket.manifest, pieces, strict=True)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_read_is_what_was_written_with_b_scaled(
    transport: Transport, dtype: str, segment: str, tmp_path: Path
) -> None:
    writer = make_writer(transport, dtype, segment, tmp_path)
    tensors = adapter()
    ticket = writer.write(tensors, scale=2.5)
    found = read(ticket)
    wanted_dtype = getattr(torch, dtype)
    assert torch.equal(found[f"{PREFIX}.lora_A.weight"], tensors[f"{PREFIX}.lora_A.weight"].to(wanted_dtype))
    assert torch.equal(found[f"{PREFIX}.lora_B.weight"], (tensors[f"{PREFIX}.lora_B.weight"] * 2.5).to(wanted_dtype))
    assert (ticket.dtype, ticket.transport) == (dtype, transport)
    assert ticket.num_bytes == (6 * 4 + 4 * 5) * wanted_dtype.itemsize
    assert [name for name, _ in ticket.manifest] == sorted(tensors)
    flat = torch.cat([found[name].reshape(-1) for name, _ in ticket.manifest])
    assert digest(flat, ticket.manifest) == ticket.digest
    writer.close()


def test_the_next_version_is_what_is_read_next(transport: Transport, segment: str, tmp_path: Path) -> None:
    writer, reader = make_writer(transport, "float32", segment, tmp_path), Reader(torch.device("cpu"))
    read(writer.write(adapter(), 1.0), reader)
    found = read(writer.write(adapter(scale=3.0), 1.0), reader)
    assert all(torch.equal(found[name], tensor) for name, tensor in adapter(scale=3.0).items())
    writer.close()


def test_adapters_of_other_shapes_take_turns(transport: Transport, segment: str, tmp_path: Path) -> None:
    """As many elements in the same place, differently divided: nothing that was worked out for one serves another."""
    writer, reader = make_writer(transport, "float32", segment, tmp_path), Reader(torch.device("cpu"))
    wide, narrow = adapter(), adapter()
    narrow[f"{PREFIX}.lora_A.weight"] = narrow[f"{PREFIX}.lora_A.weight"].reshape(5, 4)
    other = {name.replace("q_proj", "v_proj"): 2 * tensor for name, tensor in adapter().items()}
    assert len({sum(tensor.numel() for tensor in each.values()) for each in (wide, narrow, other)}) == 1
    digests = []
    for tensors in (wide, narrow, other, narrow, wide):
        ticket = writer.write(tensors, 1.0)
        digests.append(ticket.digest)
        found = read(ticket, reader)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert digests[0] == digests[4] != digests[1] == digests[3] != digests[2]
    writer.close()


def test_a_larger_adapter_gets_a_larger_segment(transport: Transport, segment: str, tmp_path: Path) -> None:
    writer, reader = make_writer(transport, "float32", segment, tmp_path), Reader(torch.device("cpu"))
    read(writer.write(adapter(2), 1.0), reader)
    for rank in (512, 8):  # the second one leaves the segment larger than it needs
        found = read(writer.write(adapter(rank), 1.0), reader)
        assert all(torch.equal(found[name], tensor) for name, tensor in adapter(rank).items())
    writer.close()


def test_a_segment_that_was_made_anew_and_not_read_is_noticed(segment: str) -> None:
    """By a run that ended between the two; others go on with its backend."""
    writer, reader = make_any_writer("memory", "float32", segment), Reader(torch.device("cpu"))
    read(writer.write(adapter(), 1.0), reader)
    writer.write(adapter(64), 1.0)
    later = adapter(scale=3.0)
    found = read(writer.write(later, 1.0), reader)
    assert all(torch.equal(found[name], tensor) for name, tensor in later.items())
    del found
    writer.close()


def test_close_leaves_nothing(transport: Transport, segment: str, tmp_path: Path) -> None:
    writer = make_writer(transport, "float32", segment, tmp_path)
    ticket = writer.write(adapter(), 1.0)
    assert Path(ticket.location).exists()
    writer.close()
    writer.close()
    assert not Path(ticket.location).exists()


def test_a_segment_is_readable_by_its_owner_alone(segment: str) -> None:
    writer = make_any_writer("memory", "float32", segment)
    writer.write(adapter(), 1.0)
    assert (SHARED_MEMORY / segment).stat().st_mode & 0o777 == 0o600
    writer.close()


def test_writers_travel_to_the_rank(transport: Transport, segment: str, tmp_path: Path) -> None:
    writer = pickle.loads(pickle.dumps(make_writer(transport, "float32", segment, tmp_path)))
    assert read(writer.write(adapter(), 1.0)).keys() == adapter().keys()
    writer.close()


def test_another_process_reads_it(transport: Transport, segment: str, tmp_path: Path) -> None:
    writer = make_writer(transport, "float32", segment, tmp_path)
    ticket = writer.write(adapter(), 1.0)
    program = (
        "import pickle, sys, torch; from rlloop.refit.transports import Reader; from rlloop.refit.digest import digest\n"
        "ticket = pickle.loads(sys.stdin.buffer.read())\n"
        "print(digest(Reader(torch.device('cpu')).read(ticket), ticket['manifest']), end='')"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        [sys.executable, "-c", program], input=pickle.dumps(asdict(ticket)), stdout=subprocess.PIPE, env=environment
    )
    assert child.stdout.decode() == ticket.digest
    assert Path(ticket.location).exists(), "the reader's end must not remove what others still use"
    writer.close()


def test_a_segment_that_is_gone_is_an_error_that_names_it(segment: str) -> None:
    writer = make_any_writer("memory", "float32", segment)
    ticket = writer.write(adapter(), 1.0)
    writer.close()
    with pytest.raises(FileNotFoundError, match=segment):
        read(replace(ticket))


def test_the_gpus_memory_wants_a_gpu() -> None:
    with pytest.raises(RefitError, match=r"--refit.transport cuda_ipc: expected weights on a GPU, got some on cpu"):
        make_any_writer("cuda_ipc", "float32", "").write(adapter(), 1.0)


def test_a_tensor_that_differs_is_named() -> None:
    manifest = [("a", (2, 3)), ("b", (1, 4)), ("c", (2, 2))]
    flat = torch.arange(14.0)
    sent = [flat[:6].view(2, 3), flat[6:10].view(1, 4), flat[10:].view(2, 2)]
    held = [each.clone() for each in sent]
    assert first_difference(manifest, sent, held) is None
    sent[0][0, 0] = held[0][0, 0] = float("nan")
    assert first_difference(manifest, sent, held) is None, "the bits are the same"
    held[1][0, 3] += 1
    held[2][0, 0] += 1
    assert first_difference(manifest, sent, held) == "b"


class Replayed:
    """`Recorded` as it is on a GPU: what was recorded is done again, whatever it is called with."""

    def __init__(self, device: torch.device) -> None:
        self._work: Callable[[], torch.Tensor] | None = None

    def __class_getitem__(cls, item: object) -> type["Replayed"]:
        return cls

    def __call__(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        self._work = self._work or work
        return self._work()


def test_what_was_recorded_serves_no_other_tensors_and_no_other_scale(
    segment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlloop.refit.transports.Recorded", Replayed)
    writer, reader = make_any_writer("memory", "float32", segment), Reader(torch.device("cpu"))
    first, second = adapter(), adapter(scale=2.0)
    for tensors, scale in ((first, 1.0), (first, 3.0), (second, 3.0), (first, 1.0)):
        found = read(writer.write(tensors, scale), reader)
        for name, tensor in tensors.items():
            assert torch.equal(found[name], tensor * (scale if "lora_B" in name else 1))
    writer.close()


def test_what_no_slot_holds_is_refused(segment: str) -> None:
    writer = make_any_writer("memory", "float32", segment)
    with pytest.raises(RefitError, match=r"hold A and B only, got .*lora_magnitude_vector .of DoRA"):
        writer.write(adapter() | {f"{PREFIX}.lora_magnitude_vector": torch.ones(6)}, 1.0)
    writer.close()
