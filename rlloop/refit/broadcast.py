"""Tensors from the trainer's rank to all engines' workers at once: NCCL between GPUs, and on CPUs Gloo.

Both sides meet at a store that the trainer's rank keeps. A broadcast begins when every reader is there for it, so that one that
has refused a ticket leaves nobody inside a collective call; one for which not all come is given up by whoever finds that first.
"""

from __future__ import annotations

from datetime import timedelta
from threading import Thread

import torch
from torch.distributed import DistStoreError, PrefixStore, ProcessGroupGloo, TCPStore

from rlloop.errors import RefitError
from rlloop.meeting import open_store

PATIENCE = 60.0
"""Seconds for which one side waits for the other: a worker may be behind a forward pass over long prompts."""
_HOST = "127.0.0.1"
_GIVEN_UP = b"given up"


class Broadcast:
    """The sending end, as memory that is offered to readers. Made by the run, pickled to the trainer's rank, used there."""

    def __init__(self, dtype: str, num_readers: int) -> None:
        self._dtype = dtype
        self._num_readers = num_readers
        self._flat = torch.empty(0)
        self._sender: _Sender | None = None

    def flat(self, num_elements: int, device: torch.device) -> torch.Tensor:
        """The first so many elements of a tensor on that device, which what was offered last has left."""
        self.withdraw()
        if self._flat.device != device or self._flat.numel() < num_elements:
            self._flat = torch.empty(num_elements, dtype=getattr(torch, self._dtype), device=device)
        return self._flat[:num_elements]

    def offer(self, flat: torch.Tensor) -> str:
        """Begin to send; -> to where readers turn for it."""
        if self._sender is None:
            self._sender = _Sender(self._num_readers + 1, flat.device)
        return self._sender.begin(flat)

    def withdraw(self) -> None:
        """No reader gets what was offered that has not begun to. Raises RefitError when those who began did not get it."""
        if self._sender is not None:
            self._sender.finish()

    def close(self) -> None:
        """Give the memory back."""
        try:
            self.withdraw()
        finally:
            if self._sender is not None:
                self._sender.group.close()
            self._sender = None
            self._flat = torch.empty(0)


class _Sender:
    def __init__(self, size: int, device: torch.device) -> None:
        self._store = open_store(_HOST, 0, timedelta(seconds=PATIENCE))
        self._where = f"{_HOST}:{self._store.port}:{size}"
        # The thread's own: who waits keeps others from using the same. Engines may be told of a ticket much later.
        self._waiting = TCPStore(
            _HOST, self._store.port, is_master=False, wait_for_workers=False, timeout=timedelta(365)
        )
        self.group = _Group(self._waiting, 0, size, device)
        # Of its own, so that neither the trainer's work waits for this nor this for that.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._number = 0
        self._thread: Thread | None = None
        self._error: Exception | None = None

    def begin(self, flat: torch.Tensor) -> str:
        self._number += 1
        self._thread = Thread(target=self._send, args=(self._number, flat), daemon=True)
        self._thread.start()
        return f"{self._where}:{self._number}"

    def finish(self) -> None:
        if self._thread is None:
            return
        self._store.compare_set(_start(self._number), "", _GIVEN_UP.decode())
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise RefitError("the weights could not be broadcast to the engines") from error

    def _send(self, number: int, flat: torch.Tensor) -> None:
        try:
            if self._waiting.get(_start(number)) == _GIVEN_UP:
                return
            with torch.cuda.stream(self._stream):  # of None, nothing
                self.group.broadcast(number, flat)
            if self._stream is not None:
                self._stream.synchronize()
        except Exception as error:
            self._error = error


class Receiver:
    """One worker's end."""

    def __init__(self, where: str, device: torch.device) -> None:
        host, port, size = where.split(":")
        patience = timedelta(seconds=PATIENCE)
        self._store = TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=patience)
        self._num_readers = int(size) - 1
        self._group = _Group(self._store, self._store.add("readers", 1), int(size), device)
        self._last = 0

    def receive(self, number: int, flat: torch.Tensor) -> None:
        """Into `flat`, when all readers have come for this one, which none does twice. Raises RefitError when it was given up."""
        if number <= self._last:
            raise RefitError("a broadcast is received once, and in turn: export anew")
        self._last = number
        if self._store.add(f"come for {number}", 1) == self._num_readers:
            self._store.compare_set(_start(number), "", "now")
        try:
            started = self._store.get(_start(number))
        except DistStoreError:  # too late, unless all came at this moment
            started = self._store.compare_set(_start(number), "", _GIVEN_UP.decode())
        if started == _GIVEN_UP:
            raise RefitError(
                f"not all of {self._num_readers} ranks of engines came for the weights within {PATIENCE:g} s, or the trainer "
                "sends these no more"
            )
        self._group.broadcast(number, flat)


class _Group:
    """The sender, rank 0, and all readers; beside the process's own default group, if it has one."""

    def __init__(self, store: TCPStore, rank: int, size: int, device: torch.device) -> None:
        self._store = store
        self._rank = rank
        self._size = size
        self._device = device
        self._group: torch.distributed.Backend | None = None

    def broadcast(self, number: int, flat: torch.Tensor) -> None:
        """From rank 0; on a GPU it is done where the current stream stands then."""
        try:
            if self._group is None:
                self._group = self._make(PrefixStore(f"group {number}", self._store))
            self._group.broadcast(flat, 0).wait()
        except Exception:
            self._group = None  # it is of no use any more
            raise

    def close(self) -> None:
        """Without the others, who may have ended."""
        if self._group is not None and self._device.type == "cuda":
            self._group.abort()
        self._group = None

    def _make(self, store: PrefixStore) -> torch.distributed.Backend:
        patience = timedelta(seconds=PATIENCE)
        if self._device.type == "cpu":
            return ProcessGroupGloo(store, self._rank, self._size, patience)
        from torch.distributed import ProcessGroupNCCL  # builds for a CPU have none

        torch.cuda.set_device(self._device)  # of a thread
        options = ProcessGroupNCCL.Options()
        options._timeout = patience
        return ProcessGroupNCCL(store, self._rank, self._size, options)


def _start(number: int) -> str:
    return f"start {number}"
