"""Tensors from the trainer's rank to all engines' workers at once, also to those on other hosts: NCCL, and on CPUs Gloo.

Both sides meet at a store that the trainer's rank keeps. A broadcast begins when every reader is there for it, so that one that
has refused a ticket leaves nobody inside a collective call; one for which nobody comes is given up.
"""

from __future__ import annotations

import os
from datetime import timedelta
from threading import Thread

import torch
from torch.distributed import DistStoreError, PrefixStore, ProcessGroupGloo, TCPStore

from rlloop.errors import RefitError

PATIENCE = timedelta(seconds=60)
"""For which one side waits for the others; a worker may be behind a forward pass over long prompts."""
_GIVEN_UP = b"given up"


class Broadcast:
    """The sending end, as memory that is offered to readers. Made by the run, pickled to the trainer's rank, used there."""

    def __init__(self, dtype: str, num_readers: int) -> None:
        self._dtype = dtype
        self._num_readers = num_readers
        self._flat = torch.empty(0)
        self._link: _Sender | None = None

    def flat(self, num_elements: int, device: torch.device) -> torch.Tensor:
        """The first so many elements of a tensor on that device, once what was offered last has left it."""
        if self._link is not None:
            self._link.finish()
        if self._flat.device != device or self._flat.numel() < num_elements:
            self._flat = torch.empty(num_elements, dtype=getattr(torch, self._dtype), device=device)
        return self._flat[:num_elements]

    def offer(self, flat: torch.Tensor) -> str:
        """Begin to send; -> to where readers turn for it."""
        if self._link is None:
            self._link = _Sender(self._num_readers)
        return self._link.begin(flat)

    def close(self) -> None:
        """Give up what nobody has come for."""
        if self._link is not None:
            self._link.finish()
            self._link = None
        self._flat = torch.empty(0)


class _Sender:
    def __init__(self, num_readers: int) -> None:
        # As torch's launchers name the host that all can reach.
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=PATIENCE)
        # One for the thread: who waits keeps others from using the same. Readers may be told of a ticket much later.
        self._threads = TCPStore(
            host, self._store.port, is_master=False, wait_for_workers=False, timeout=timedelta(days=365)
        )
        self._where = f"{host}:{self._store.port}:{num_readers + 1}"
        self._number = 0
        self._thread: Thread | None = None
        self._group: Group | None = None
        self._error: Exception | None = None

    def begin(self, flat: torch.Tensor) -> str:
        self._number += 1
        self._thread = Thread(target=self._send, args=(self._number, flat), daemon=True)
        self._thread.start()
        return f"{self._where}:{self._number}"

    def finish(self) -> None:
        """Returns when the tensor may be written to again. Raises what sending raised."""
        if self._thread is None:
            return
        # Who is first decides, the last reader or this.
        self._store.compare_set(_start(self._number), "", _GIVEN_UP.decode())
        self._thread.join()
        self._thread = None
        if self._error is not None:
            raise RefitError("the weights could not be broadcast to the engines") from self._error

    def _send(self, number: int, flat: torch.Tensor) -> None:
        try:
            if self._threads.get(_start(number)) == _GIVEN_UP:
                return
            if flat.device.type == "cuda":
                torch.cuda.set_device(flat.device)  # a thread's own
            if self._group is None:
                self._group = Group(self._threads, 0, int(self._where.rpartition(":")[2]), flat.device)
            self._group.broadcast(flat)
        except Exception as error:
            self._error = error


class Receiver:
    """One worker's end."""

    def __init__(self, where: str, device: torch.device) -> None:
        host, port, size = where.split(":")
        self._store = TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=PATIENCE)
        self._size = int(size)
        self._rank = self._store.add("readers", 1)
        self._device = device
        self._group: Group | None = None

    def receive(self, number: int, flat: torch.Tensor) -> None:
        """Into `flat`, when all readers have come for this one. Raises RefitError when they do not, or it was given up."""
        if self._store.add(f"come for {number}", 1) == self._size - 1:
            self._store.compare_set(_start(number), "", "now")
        try:
            started = self._store.get(_start(number))
        except DistStoreError as error:
            raise RefitError(
                f"not all of {self._size - 1} ranks of engines came for the weights within {PATIENCE.total_seconds():g} s"
            ) from error
        if started == _GIVEN_UP:
            raise RefitError("the trainer sends these weights no more")
        if self._group is None:
            self._group = Group(self._store, self._rank, self._size, self._device)
        self._group.broadcast(flat)


class Group:
    """Of the sender, rank 0, and all readers; beside the process's own default group, if it has one."""

    def __init__(self, store: TCPStore, rank: int, size: int, device: torch.device) -> None:
        own = PrefixStore("group", store)
        if device.type == "cuda":
            from torch.distributed import ProcessGroupNCCL

            options = ProcessGroupNCCL.Options()
            options._timeout = PATIENCE
            self._group = ProcessGroupNCCL(own, rank, size, options)
        else:
            self._group = ProcessGroupGloo(own, rank, size, PATIENCE)

    def broadcast(self, flat: torch.Tensor) -> None:
        """From rank 0; on a GPU it is done where the current stream stands then."""
        self._group.broadcast(flat, 0).wait()


def _start(number: int) -> str:
    return f"start {number}"
