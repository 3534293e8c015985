"""How an adapter's bytes get from the trainer's process to the engine's: in the GPU's memory, in shared memory, by a broadcast,
or in a file.

A writer is made by the run, pickled to the trainer's rank, and writes there; a reader lives in the engine's worker. What
travels is one flat tensor in the engine's dtype, B scaled already, so that a slot holds exactly the bytes that were sent. It is
read before the next one is written.
"""

from __future__ import annotations

import base64
import math
import mmap
import os
import pickle
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.multiprocessing.reductions import reduce_tensor

from rlloop.errors import RefitError
from rlloop.recorded import Recorded
from rlloop.refit.broadcast import Broadcast, Receiver
from rlloop.refit.digest import checksum, spelled
from rlloop.types import AdapterTicket, Manifest, Transport

FLAT = "adapter"  # the one tensor of a file
SHARED_MEMORY = Path("/dev/shm")


def split(flat: torch.Tensor, manifest: Manifest) -> list[torch.Tensor]:
    """Views of the flat tensor, in the manifest's order."""
    sizes = [math.prod(shape) for _, shape in manifest]
    return [piece.view(*shape) for piece, (_, shape) in zip(flat.split(sizes), manifest, strict=True)]


class _Packer:
    """Flattens adapters. What lies where is worked out anew only for other names, shapes or another flat tensor: for the 448
    tensors of an 8B model that takes longer than to copy them. So it is with the kernels, where the tensors stay, too."""

    def __init__(self) -> None:
        self._shapes: dict[str, torch.Size] = {}
        self._flat = torch.empty(0)
        self._manifest: Manifest = ()
        self._downs: list[str] = []
        self._ups: list[str] = []
        self._places: list[torch.Tensor] = []
        """Of the former, then of the latter."""
        self._packed_from: object = None
        self._copy = Recorded[torch.Tensor](self._flat.device)

    @torch.no_grad()
    def pack(self, tensors: Mapping[str, torch.Tensor], scale: float, flat: torch.Tensor) -> tuple[Manifest, str]:
        """Into `flat`, on their device, B scaled; -> what is where, and the digest."""
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        if shapes != self._shapes or (flat.data_ptr(), flat.numel()) != (self._flat.data_ptr(), self._flat.numel()):
            self._arrange(shapes, flat)
        place = [(name, each.data_ptr(), each.stride(), each.dtype) for name, each in tensors.items()]
        if (scale, place) != self._packed_from:
            self._packed_from, self._copy = (scale, place), Recorded(flat.device)

        def copy() -> torch.Tensor:
            # In the tensors' own precision; cast as they are copied.
            scaled = torch._foreach_mul([tensors[name] for name in self._ups], scale)
            torch._foreach_copy_(self._places, [*(tensors[name] for name in self._downs), *scaled])
            return checksum(flat)

        return self._manifest, spelled(self._copy(copy), self._manifest)

    def _arrange(self, shapes: dict[str, torch.Size], flat: torch.Tensor) -> None:
        if others := [name for name in shapes if ".lora_A." not in name and ".lora_B." not in name]:
            raise RefitError(f"an engine's adapter slots hold A and B only, got {others[0]} (of DoRA)")
        self._manifest = tuple((name, (shapes[name][0], shapes[name][1])) for name in sorted(shapes))
        names = [name for name, _ in self._manifest]
        places = dict(zip(names, split(flat, self._manifest), strict=True))
        self._downs = [name for name in places if ".lora_A." in name]
        self._ups = [name for name in places if ".lora_B." in name]
        self._places = [places[name] for name in (*self._downs, *self._ups)]
        self._shapes, self._flat = shapes, flat  # kept, so that no other tensor gets its address
        self._packed_from = None


@dataclass
class GpuMemory:
    """Of the trainer's GPU, which the engine's process maps, too: nothing passes through the host."""

    dtype: str
    _location: str = field(default="", init=False, repr=False)
    _whole: torch.Tensor | None = field(default=None, init=False, repr=False)

    def flat(self, num_elements: int, device: torch.device) -> torch.Tensor:
        """The first so many. Raises RefitError unless the device is a GPU."""
        if device.type != "cuda":
            raise RefitError(f"--refit.transport cuda_ipc: expected weights on a GPU, got some on {device}")
        if self._whole is None or self._whole.numel() < num_elements:
            self._whole = torch.empty(num_elements, dtype=getattr(torch, self.dtype), device=device)
            shared = (_gpu_id(device.index), reduce_tensor(self._whole))
            self._location = base64.b64encode(pickle.dumps(shared)).decode()
        return self._whole[:num_elements]

    def offer(self, flat: torch.Tensor) -> str:
        """How to map it."""
        return self._location

    def withdraw(self) -> None:
        """Nothing: who reads does it alone."""

    def close(self) -> None:
        """Give it back."""
        self._whole = None


@dataclass
class HostMemory:
    """One shared-memory segment that lives as long as the run: fresh pages would cost more than the copy.

    A plain file of /dev/shm, and not multiprocessing's SharedMemory, whose tracker removes segments that others still use.
    """

    dtype: str
    name: str
    _segment: _Segment | None = field(default=None, init=False, repr=False)

    @property
    def _path(self) -> Path:
        return SHARED_MEMORY / self.name

    def flat(self, num_elements: int, device: torch.device) -> torch.Tensor:
        """The first so many, on the host; page-locked for copies from a GPU."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        num_bytes = num_elements * dtype.itemsize
        if self._segment is None or self._segment.num_bytes < num_bytes:
            self.close()
            flags = os.O_CREAT | os.O_RDWR
            self._segment = _Segment(self._path, flags, num_bytes, page_lock=device.type == "cuda")
        return self._segment.tensor(dtype, num_elements)

    def offer(self, flat: torch.Tensor) -> str:
        """The segment's path."""
        return str(self._path)

    def withdraw(self) -> None:
        """Nothing: who reads does it alone."""

    def close(self) -> None:
        """Remove the segment."""
        if self._segment is not None:
            self._path.unlink(missing_ok=True)
            self._segment.release()
            self._segment = None


Shared = GpuMemory | HostMemory | Broadcast


def make_shared(transport: Transport, dtype: str, name: str, num_readers: int) -> Shared:
    """Memory that other processes read; `name` is that of a segment."""
    if transport == "cuda_ipc":
        return GpuMemory(dtype)
    return Broadcast(dtype, num_readers) if transport == "broadcast" else HostMemory(dtype, name)


@dataclass
class SharedWriter:
    """Writes into memory that is shared."""

    transport: Transport
    shared: Shared
    _staged: torch.Tensor | None = field(default=None, init=False, repr=False)
    _packer: _Packer = field(default_factory=_Packer, init=False, repr=False)

    def write(self, tensors: Mapping[str, torch.Tensor], scale: float) -> AdapterTicket:
        """Flatten, scale B, cast, digest. Raises RefitError for cuda_ipc unless the tensors are on a GPU."""
        started = time.monotonic()
        device = _device(tensors)
        flat = self.shared.flat(_count(tensors), device)
        if flat.device == device:
            manifest, found = self._packer.pack(tensors, scale, flat)
        else:  # in one copy from the device, not in one for each tensor
            if self._staged is None or self._staged.numel() != flat.numel():
                self._staged = torch.empty_like(flat, device=device)
            manifest, found = self._packer.pack(tensors, scale, self._staged)
            flat.copy_(self._staged)
        return _ticket(self.transport, self.shared.offer(flat), flat, manifest, found, started)

    def close(self) -> None:
        """Give the memory back."""
        self.shared.close()
        self._staged = None
        self._packer = _Packer()


@dataclass
class DiskWriter:
    """Writes safetensors files into a folder, one version at a time: the fallback, and what memory is measured against."""

    dtype: str
    folder: Path

    def write(self, tensors: Mapping[str, torch.Tensor], scale: float) -> AdapterTicket:
        """Flatten, scale B, cast, digest, save."""
        started = time.monotonic()
        flat = torch.empty(_count(tensors), dtype=getattr(torch, self.dtype), device=_device(tensors))
        manifest, found = _Packer().pack(tensors, scale, flat)
        path = self.folder / "refit.safetensors"
        self.folder.mkdir(parents=True, exist_ok=True)
        save_file({FLAT: flat}, path)
        return _ticket("disk", str(path), flat, manifest, found, started)

    def close(self) -> None:
        """Remove the file."""
        (self.folder / "refit.safetensors").unlink(missing_ok=True)


Writer = SharedWriter | DiskWriter


def make_writer(
    transport: Transport, dtype: str, name: str, folder: Path = Path("refit"), num_readers: int = 1
) -> Writer:
    """`name` is that of shared memory, `folder` that of files; `num_readers`: ranks of all engines, for a broadcast."""
    if transport == "disk":
        return DiskWriter(dtype, folder)
    return SharedWriter(transport, make_shared(transport, dtype, name, num_readers))


class Reader:
    """Reads what a writer wrote, in the engine's worker. What it maps, and on CUDA page-locks, it keeps."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._segments: dict[str, _Segment] = {}
        self._mapped: dict[str, torch.Tensor] = {}
        self._receivers: dict[str, Receiver] = {}
        self._received = torch.empty(0, device=device)

    def read(self, ticket: Mapping[str, Any]) -> torch.Tensor:
        """The flat tensor, where the transport has it: valid until the writer writes again. A broadcast can be read once."""
        dtype: torch.dtype = getattr(torch, ticket["dtype"])
        num_elements = ticket["num_bytes"] // dtype.itemsize
        if ticket["transport"] == "disk":
            with safe_open(ticket["location"], framework="pt", device=str(self._device)) as file:
                found: torch.Tensor = file.get_tensor(FLAT)
            return found
        if ticket["transport"] == "cuda_ipc":
            return self._map(ticket["location"])[:num_elements]
        if ticket["transport"] == "broadcast":
            return self._receive(ticket["location"], dtype, num_elements)
        return self._attach(ticket["location"], ticket["num_bytes"]).tensor(dtype, num_elements)

    def _map(self, handle: str) -> torch.Tensor:
        if handle not in self._mapped:
            if len(self._mapped) > 1:  # of a stream there are two in turn; one that was replaced must be let go
                del self._mapped[next(iter(self._mapped))]
            gpu, (rebuild, arguments) = pickle.loads(base64.b64decode(handle))
            self._mapped[handle] = rebuild(*arguments[:6], _gpu_index(gpu), *arguments[7:])
        return self._mapped[handle]

    def _receive(self, location: str, dtype: torch.dtype, num_elements: int) -> torch.Tensor:
        """Always into the same memory, which what is recorded for it then finds there."""
        where, _, number = location.rpartition(":")
        if where not in self._receivers:
            self._receivers[where] = Receiver(where, self._device)
        if self._received.dtype != dtype or self._received.numel() < num_elements:
            self._received = torch.empty(num_elements, dtype=dtype, device=self._device)
        flat = self._received[:num_elements]
        self._receivers[where].receive(int(number), flat)
        return flat

    def _attach(self, location: str, num_bytes: int) -> _Segment:
        segment = self._segments.get(location)
        # A writer whose adapters grew, of a run that ended before they were read, has another file of that name.
        if segment is None or segment.num_bytes < num_bytes or segment.inode != os.stat(location).st_ino:
            if segment is not None:
                segment.release()
            segment = _Segment(Path(location), os.O_RDWR, None, page_lock=self._device.type == "cuda")
            self._segments[location] = segment
        return segment


class _Segment:
    """A file in memory; `num_bytes` sets its size. Page-locked for a GPU: where that is refused, copies are slower, and right."""

    def __init__(self, path: Path, flags: int, num_bytes: int | None, *, page_lock: bool) -> None:
        descriptor = os.open(path, flags, 0o600)
        try:
            if num_bytes is not None:
                os.ftruncate(descriptor, num_bytes)
                # Or a write beyond what is free ends the process by SIGBUS.
                os.posix_fallocate(descriptor, 0, num_bytes)
            self._memory = mmap.mmap(descriptor, 0)
            self.inode = os.fstat(descriptor).st_ino
        except OSError as error:
            raise RefitError(f"{path}: {error}; enlarge {path.parent} or use --refit.transport disk") from error
        finally:
            os.close(descriptor)
        self.num_bytes = len(self._memory)
        self._is_locked = page_lock and _page_lock(self.tensor(torch.uint8, self.num_bytes))

    def tensor(self, dtype: torch.dtype, count: int) -> torch.Tensor:
        """The first so many elements, in place."""
        return torch.frombuffer(self._memory, dtype=dtype, count=count)

    def release(self) -> None:
        """Unlock the pages, while they are still mapped; they are unmapped with the last tensor."""
        if self._is_locked:
            torch.cuda.cudart().cudaHostUnregister(self.tensor(torch.uint8, 1).data_ptr())
            self._is_locked = False


def _page_lock(whole: torch.Tensor) -> bool:
    return int(torch.cuda.cudart().cudaHostRegister(whole.data_ptr(), whole.numel(), 0)) == 0


def _count(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _device(tensors: Mapping[str, torch.Tensor]) -> torch.device:
    return next(iter(tensors.values())).device


def _gpu_id(index: int | None) -> str:
    """The same in every process, whichever GPUs it sees."""
    return str(torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index).uuid)


def _gpu_index(gpu_id: str) -> int:
    """Raises RefitError when this process does not see that GPU."""
    seen = [_gpu_id(index) for index in range(torch.cuda.device_count())]
    if gpu_id not in seen:
        raise RefitError(
            f"the trainer's GPU {gpu_id} is not among those that the engine sees, {seen}: use --refit.transport memory"
        )
    return seen.index(gpu_id)


def _ticket(
    transport: Transport, location: str, flat: torch.Tensor, manifest: Manifest, found: str, started: float
) -> AdapterTicket:
    return AdapterTicket(
        manifest=manifest,
        dtype=str(flat.dtype).removeprefix("torch."),
        digest=found,
        transport=transport,
        location=location,
        num_bytes=flat.numel() * flat.element_size(),
        export_seconds=time.monotonic() - started,
    )
