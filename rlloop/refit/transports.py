"""How an adapter's bytes get from the trainer's process to the engine's: shared memory, or a file.

A writer is made by the run, pickled to the trainer's rank, and writes there; a reader lives in the engine's worker. What
travels is one flat tensor in the engine's dtype, B scaled already, so that a slot holds exactly the bytes that were sent.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rlloop.errors import RefitError
from rlloop.refit.digest import digest
from rlloop.types import AdapterTicket

FLAT = "adapter"  # the one tensor of a file
SHARED_MEMORY = Path("/dev/shm")


@dataclass
class MemoryWriter:
    """Writes into one shared-memory segment that lives as long as the run: fresh pages would cost more than the copy.

    A plain file of /dev/shm, and not multiprocessing's SharedMemory, whose tracker removes segments that others still use.
    """

    dtype: str
    segment_name: str
    _segment: _Segment | None = field(default=None, init=False, repr=False)

    def write(self, tensors: Mapping[str, torch.Tensor], scale: float) -> AdapterTicket:
        """Flatten, scale B, cast, digest."""
        started = time.monotonic()
        dtype: torch.dtype = getattr(torch, self.dtype)
        num_elements = sum(tensor.numel() for tensor in tensors.values())
        path = SHARED_MEMORY / self.segment_name
        if self._segment is None or self._segment.num_bytes < num_elements * dtype.itemsize:
            self.close()
            on_gpu = any(tensor.is_cuda for tensor in tensors.values())
            self._segment = _Segment(path, os.O_CREAT | os.O_RDWR, num_elements * dtype.itemsize, page_lock=on_gpu)
        flat = self._segment.tensor(dtype, num_elements)
        return _flatten(tensors, scale, flat, "memory", str(path), started)

    def close(self) -> None:
        """Remove the segment."""
        if self._segment is not None:
            (SHARED_MEMORY / self.segment_name).unlink(missing_ok=True)
            self._segment.release()
            self._segment = None


@dataclass
class DiskWriter:
    """Writes safetensors files into a folder, one version at a time: the fallback, and what memory is measured against."""

    dtype: str
    folder: Path

    def write(self, tensors: Mapping[str, torch.Tensor], scale: float) -> AdapterTicket:
        """Flatten, scale B, cast, digest, save."""
        started = time.monotonic()
        dtype: torch.dtype = getattr(torch, self.dtype)
        flat = torch.empty(sum(tensor.numel() for tensor in tensors.values()), dtype=dtype)
        path = self.folder / "refit.safetensors"
        ticket = _flatten(tensors, scale, flat, "disk", str(path), started)
        self.folder.mkdir(parents=True, exist_ok=True)
        save_file({FLAT: flat}, path)
        return replace(ticket, export_seconds=time.monotonic() - started)

    def close(self) -> None:
        """Remove the file."""
        (self.folder / "refit.safetensors").unlink(missing_ok=True)


class Reader:
    """Reads what a writer wrote, in the engine's worker. Segments are mapped, and on CUDA page-locked, once and kept."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._segments: dict[str, _Segment] = {}

    def read(self, ticket: Mapping[str, Any], into: torch.Tensor | None = None) -> torch.Tensor:
        """A flat tensor on the device: vLLM keeps what it is given, and the next version overwrites the source.

        `into` is one of the same size that nobody uses any more: fresh pages cost more than the copy.
        """
        if ticket["transport"] == "disk":
            with safe_open(ticket["location"], framework="pt", device=str(self._device)) as file:
                found = file.get_tensor(FLAT)
            return found.clone() if into is None else into.copy_(found)  # on a CPU it is a view of the file
        dtype: torch.dtype = getattr(torch, ticket["dtype"])
        segment = self._attach(ticket["location"], ticket["num_bytes"])
        flat = segment.tensor(dtype, ticket["num_bytes"] // dtype.itemsize)
        return (
            flat.to(self._device, non_blocking=True, copy=True) if into is None else into.copy_(flat, non_blocking=True)
        )

    def _attach(self, location: str, num_bytes: int) -> _Segment:
        segment = self._segments.get(location)
        if segment is None or segment.num_bytes < num_bytes:
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


def _flatten(
    tensors: Mapping[str, torch.Tensor],
    scale: float,
    flat: torch.Tensor,
    transport: Literal["memory", "disk"],
    location: str,
    started: float,
) -> AdapterTicket:
    if others := [name for name in tensors if ".lora_A." not in name and ".lora_B." not in name]:
        raise RefitError(f"an engine's adapter slots hold A and B only, got {others[0]} (of DoRA)")
    device = next(iter(tensors.values())).device
    # From a device in one copy, not in one for each tensor.
    staged = flat if device.type == "cpu" else torch.empty_like(flat, device=device)
    manifest, start = [], 0
    for name in sorted(tensors):
        source = tensors[name].detach()
        part = staged[start : start + source.numel()].view(source.shape)
        part.copy_(source * scale if ".lora_B." in name else source)
        manifest.append((name, (source.shape[0], source.shape[1])))
        start += source.numel()
    found = digest(staged, manifest)
    if staged is not flat:
        flat.copy_(staged)
    return AdapterTicket(
        manifest=tuple(manifest),
        rank=max(shape[0] for name, shape in manifest if ".lora_A." in name),
        dtype=str(flat.dtype).removeprefix("torch."),
        digest=found,
        transport=transport,
        location=location,
        num_bytes=flat.numel() * flat.element_size(),
        export_seconds=time.monotonic() - started,
    )
