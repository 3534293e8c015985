"""What rlloop adds to vLLM's workers: load an adapter from memory, read back what a slot holds, drop it.

vLLM mixes this class into its worker (`worker_extension_cls`); `collective_rpc` calls the methods on every rank, between
two forward passes. vLLM itself checks almost nothing here: names that no layer serves, or an A without its B, are skipped
in silence, and the base model is sampled. So everything is checked before the load, and read back after it.
"""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext
from typing import Any

import torch

from rlloop.engine import cpu_lora, vllm_compat
from rlloop.engine.flights import HOPPING_ID
from rlloop.refit.digest import digest
from rlloop.refit.slots import Slots, first_difference
from rlloop.refit.transports import Reader


class LoraRefit:
    """Methods are prefixed, because an attribute that vLLM's worker has already trips an assertion."""

    model_runner: Any

    def refit_load(self, version: int, ticket: dict[str, Any], serves_hops: bool) -> dict[str, Any]:
        """Load a version into a free slot, and into that of the requests that hop.

        -> `error`, with the slots as they were, on anything vLLM would ignore. Not raised: vLLM stops listening to the other
        ranks then, and takes their answers for those of the next call.
        """
        try:
            if "_refit" not in self.__dict__:
                self._refit = _Refit(self.model_runner.lora_manager)
            report = self._refit.load(version, ticket)
            if serves_hops and not report["different"] and report["digest"] == ticket["digest"]:
                report |= self._refit.swap()
                report["num_sampled"] = vllm_compat.num_sampled_tokens(self.model_runner)
                report["load_seconds"] += time.monotonic() - report["swapped_at"]
            return report
        except Exception as error:
            logging.getLogger("vllm.rlloop").exception("policy version %d", version)
            return {"error": str(error)}

    def refit_drop(self, version: int) -> bool:
        """Free a version's slot."""
        return self.model_runner.lora_manager.remove_adapter(version + 1)


class _Refit:
    """What a worker keeps from one version to the next."""

    def __init__(self, lora_manager: Any) -> None:
        self._device: torch.device = lora_manager.device
        self._dtype: torch.dtype = lora_manager.lora_config.lora_dtype
        self._slots = Slots(lora_manager._adapter_manager)
        self._reader = Reader(self._device)
        # A stream of its own, since nothing here waits for the forward pass that may be running: its slots are others.
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._staged = torch.empty(0, dtype=self._dtype, device=self._device)
        self._contents = torch.empty(0, dtype=self._dtype, device=self._device)
        self._parts: list[torch.Tensor] = []
        if self._device.type == "cpu":
            cpu_lora.install()

    def load(self, version: int, ticket: dict[str, Any]) -> dict[str, Any]:
        """See `LoraRefit.refit_load`."""
        if f"torch.{ticket['dtype']}" != str(self._dtype):
            raise ValueError(f"the adapter came as {ticket['dtype']}, this engine's slots are {self._dtype}")
        self._slots.check_free(version + 1)
        manifest = ticket["manifest"]
        self._slots.arrange(manifest)
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            started = time.monotonic()
            flat = self._on_device(self._reader.read(ticket))
            transferred = self._now()
            self._parts = self._slots.own_parts(flat)
            held = self._slots.fill(version + 1, self._parts)
            loaded = self._now()
            if self._slots.are_sharded:
                # The slots hold a part of what was sent: that all of it came, and that they hold their part of that.
                found, different = digest(flat, manifest), first_difference(manifest, self._parts, held)
            else:
                if self._contents.numel() != flat.numel():
                    self._contents = torch.empty_like(flat)
                found = digest(torch.cat([each.reshape(-1) for each in held], out=self._contents), manifest)
                different = None if found == ticket["digest"] else first_difference(manifest, self._parts, held)
            return {
                "digest": found,
                "different": different,
                "transfer_seconds": transferred - started,
                "load_seconds": loaded - transferred,
                "verify_seconds": time.monotonic() - loaded,
            }

    def swap(self) -> dict[str, Any]:
        """Give requests that hop what was loaded last; on the stream of the forward passes, of which one may still read it."""
        swapped_at = time.monotonic()
        held = self._slots.fill(HOPPING_ID, self._parts)
        return {"swapped_at": swapped_at, "different": first_difference(self._slots.manifest, self._parts, held)}

    def _on_device(self, flat: torch.Tensor) -> torch.Tensor:
        """In one copy, where it would be one for each tensor."""
        if flat.device == self._device:
            return flat
        if self._staged.numel() != flat.numel():
            self._staged = torch.empty_like(flat, device=self._device)
        return self._staged.copy_(flat, non_blocking=True)

    def _now(self) -> float:
        if self._stream:
            self._stream.synchronize()
        return time.monotonic()
