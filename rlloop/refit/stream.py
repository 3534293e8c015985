"""Whole weights on their way from the trainer's rank to engines' workers, in buckets: one is filled while the other is read.

The trainer's side listens on a socket, and each worker connects when it is told to take a version. What passes through the
socket is where a bucket lies, what is in it and its digest, and back the word that it was read: neither side needs a second copy
of the weights, and where one dies the other hears of it at once.
"""

from __future__ import annotations

import math
import os
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from rlloop.errors import RefitError
from rlloop.refit.broadcast import PATIENCE
from rlloop.refit.digest import digest
from rlloop.refit.transports import Reader, Shared, make_shared, split
from rlloop.types import Transport

Named = tuple[str, torch.Tensor]


class WeightsSender:
    """Made by the run, pickled to the trainer's rank, used there. `name` is that of the shared memory, and of the socket."""

    def __init__(
        self, transport: Transport, dtype: str, name: str, num_readers: int, *, bucket_bytes: int = 1 << 29
    ) -> None:
        self._transport = transport
        self._dtype = dtype
        self._name = name
        self._num_readers = num_readers
        self._bucket_bytes = bucket_bytes
        self._listener: socket.socket | None = None
        self._buckets: list[_Bucket] = []

    @property
    def location(self) -> str:
        """To which readers connect."""
        return self._name

    def listen(self) -> None:
        """Let readers connect; they wait until there is something to send."""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(f"\0{self._name}")  # of no file, so that nothing is left behind
        self._listener.listen()
        self._listener.settimeout(1.0)

    def send(self, weights: Iterator[Named], check_interrupt: Callable[[], None]) -> None:
        """To every reader; returns when all have read all, or one hangs up, for which it has a reason to tell its engine.

        `check_interrupt` raises when nobody waits for that any more. Whatever is raised, no reader is left waiting.
        """
        readers: list[Connection] = []
        try:
            while len(readers) < self._num_readers:
                # All are told at once, so when one has come the others are not far.
                deadline = time.monotonic() + PATIENCE if readers else math.inf
                readers.append(self._accept(deadline, check_interrupt))
            with suppress(_HungUp):
                self._send(readers, weights, check_interrupt)
        finally:
            if len(readers) < self._num_readers:
                self._stop_listening()  # or those who ask later would wait
            for reader in readers:
                reader.close()
            for bucket in self._buckets:
                bucket.shared.withdraw()

    def close(self) -> None:
        """Give socket and memory back."""
        self._stop_listening()
        for bucket in self._buckets:
            bucket.shared.close()
        self._buckets = []

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def _accept(self, deadline: float, check_interrupt: Callable[[], None]) -> Connection:
        if self._listener is None:
            raise RefitError(
                "not all ranks of engines asked for the weights of an earlier version: start the backend anew"
            )
        while time.monotonic() < deadline:
            check_interrupt()
            with suppress(TimeoutError):
                accepted, _ = self._listener.accept()
                with accepted:
                    accepted.setblocking(True)
                    if _is_ours(accepted):
                        return Connection(accepted.detach())
        raise RefitError(
            f"not all of {self._num_readers} ranks of engines asked for the weights within {PATIENCE:.0f} s"
        )

    def _send(self, readers: list[Connection], weights: Iterable[Named], check_interrupt: Callable[[], None]) -> None:
        number = 0
        for bucket in self._filled(weights):
            header = bucket.header()
            if number:
                _wait(readers, check_interrupt)  # so that the one before is free when this one is full
            _tell(readers, header | {"location": bucket.offer()})
            number += 1
        if number:
            _wait(readers, check_interrupt)
        _tell(readers, None)

    def _filled(self, weights: Iterable[Named]) -> Iterator[_Bucket]:
        number = 0
        bucket: _Bucket | None = None
        for name, tensor in weights:
            if bucket is not None and not bucket.has_room(tensor):
                yield bucket
                bucket, number = None, number + 1
            if bucket is None:
                bucket = self._empty(number % 2, tensor)
            bucket.add(name, tensor)
        if bucket is not None:
            yield bucket

    def _empty(self, number: int, first: torch.Tensor) -> _Bucket:
        """A bucket with room for at least the first tensor."""
        if number == len(self._buckets):
            shared = make_shared(self._transport, self._dtype, f"{self._name}-{number}", self._num_readers)
            self._buckets.append(_Bucket(self._transport, self._dtype, shared))
        self._buckets[number].clear(self._bucket_bytes, first)
        return self._buckets[number]


class _Bucket:
    def __init__(self, transport: Transport, dtype: str, shared: Shared) -> None:
        self._transport = transport
        self._dtype = dtype
        self.shared = shared
        self._flat = torch.empty(0)
        self._manifest: list[tuple[str, tuple[int, ...]]] = []
        self._used = 0

    def clear(self, num_bytes: int, first: torch.Tensor) -> None:
        num_elements = max(num_bytes // getattr(torch, self._dtype).itemsize, first.numel())
        self._flat = self.shared.flat(num_elements, first.device)
        self._manifest, self._used = [], 0

    def has_room(self, tensor: torch.Tensor) -> bool:
        return self._used + tensor.numel() <= self._flat.numel()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self._flat[self._used :][: tensor.numel()].copy_(tensor.reshape(-1))
        self._manifest.append((name, tuple(tensor.shape)))
        self._used += tensor.numel()

    def header(self) -> dict[str, Any]:
        """As a ticket has it, but for where. Waits until all is there."""
        flat = self._flat[: self._used]
        return {
            "manifest": self._manifest,
            "digest": digest(flat, self._manifest),
            "dtype": self._dtype,
            "transport": self._transport,
            "num_bytes": flat.numel() * flat.element_size(),
        }

    def offer(self) -> str:
        """Let readers have it; -> where."""
        return self.shared.offer(self._flat[: self._used])


def _is_ours(connected: socket.socket) -> bool:
    """A name that is of no file has no permissions, and what comes through is unpickled."""
    layout = struct.Struct("iII")  # ucred: process, user, group
    _, user, _ = layout.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, layout.size))
    return bool(user == os.geteuid())


class _HungUp(Exception):
    """A reader did."""


def _tell(readers: Iterable[Connection], header: dict[str, Any] | None) -> None:
    try:
        for reader in readers:
            reader.send(header)
    except OSError as error:
        raise _HungUp from error


def _wait(readers: Iterable[Connection], check_interrupt: Callable[[], None]) -> None:
    """For all; the first that hangs up is heard at once."""
    deadline = time.monotonic() + PATIENCE
    waiting = [*readers]
    try:
        while waiting:
            ready = wait(waiting, 1.0)
            for reader in ready:
                assert isinstance(reader, Connection)
                reader.recv_bytes()
                waiting.remove(reader)
            if not ready:
                check_interrupt()
                if time.monotonic() > deadline:
                    raise RefitError(f"an engine did not read the weights that it was sent within {PATIENCE:.0f} s")
    except (EOFError, OSError) as error:
        raise _HungUp from error


class WeightsReader:
    """In an engine's worker."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._reader = Reader(device)
        self.num_bytes = 0
        """That have come through the last stream."""

    def connect(self, address: str) -> Connection:
        """To a sender that listens."""
        with socket.socket(socket.AF_UNIX) as ours:
            ours.connect(f"\0{address}")
            if not _is_ours(ours):
                raise RefitError(f"another user's process listens where the trainer's weights come from, at {address}")
            return Connection(ours.detach())

    def read(self, stream: Connection) -> Iterator[Named]:
        """Each tensor where the transport has it, and until the next is asked for: to keep one is to copy it. Raises RefitError
        on any that is not as it was sent."""
        self.num_bytes = 0
        while (header := self._next(stream)) is not None:
            yield from self._read(header)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self.num_bytes += header["num_bytes"]
            with suppress(OSError):  # who hung up is met at the next
                stream.send_bytes(b"")

    def _read(self, header: Mapping[str, Any]) -> Iterator[Named]:
        flat = self._reader.read(header).to(self._device)
        if digest(flat, header["manifest"]) != header["digest"]:
            raise RefitError(f"weights did not arrive as they were sent, in those from {header['manifest'][0][0]} on")
        names = [name for name, _ in header["manifest"]]
        yield from zip(names, split(flat, header["manifest"]), strict=True)

    def _next(self, stream: Connection) -> Mapping[str, Any] | None:
        try:
            if not stream.poll(2 * PATIENCE):  # the trainer's side gives up first, and says why
                raise RefitError(f"the trainer sent no weights for {2 * PATIENCE:.0f} s")
            header: Mapping[str, Any] | None = stream.recv()
        except (EOFError, OSError) as error:
            raise RefitError("the trainer hung up before all weights had come") from error
        return header
