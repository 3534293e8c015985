"""What rlloop adds to vLLM's workers: load an adapter from memory, prove what arrived, drop it.

vLLM mixes this class into its worker (`worker_extension_cls`); `collective_rpc` calls the methods on every rank, between
two forward passes. vLLM itself checks almost nothing here: names that no layer serves, or an A without its B, are skipped
in silence, and the base model is sampled. So everything is checked before the load, and slots are read back after it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch

from rlloop.engine import cpu_lora, gpu_logprobs, gpu_lora, vllm_compat
from rlloop.engine.flights import HOPPING_ID
from rlloop.refit.arrivals import Arrivals
from rlloop.refit.digest import checksum, digest, spelled
from rlloop.refit.merged import Merged
from rlloop.refit.slots import Slot, Slots, first_difference
from rlloop.refit.transports import split
from rlloop.refit.whole import Whole
from rlloop.types import Manifest, RefitForm

if torch.cuda.is_available():
    # Here, for vLLM imports this into each worker before all else.
    vllm_compat.start_with_what_is_used()
    gpu_logprobs.install()


class LoraRefit:
    """Methods are prefixed, because an attribute that vLLM's worker has already trips an assertion."""

    model_runner: Any

    def refit_load(self, version: int, ticket: dict[str, Any], form: RefitForm, swaps: bool) -> dict[str, Any]:
        """Load a version beside the others, and if it `swaps`, under the requests that go on with the newest.

        -> `error` on anything vLLM would ignore, with what is served as it was, unless there is `swapped_at`. Not raised: vLLM
        stops listening to the other ranks then, and takes their answers for those of the next call.
        """
        report: dict[str, Any] = {}
        try:
            if "_refit" not in self.__dict__:
                handlers: dict[RefitForm, Callable[[Any], _InSlots | Merged | Whole]]
                handlers = {"adapter": _InSlots, "merged": Merged, "full": Whole}
                self._refit = handlers[form](self)
            report = self._refit.load(version, ticket)
            if swaps and not report["different"] and report["digest"] == ticket["digest"]:
                report["swapped_at"] = time.monotonic()
                report["different"] = self._refit.swap()
                report["num_sampled"] = vllm_compat.num_sampled_tokens(self.model_runner)
                report["load_seconds"] += time.monotonic() - report["swapped_at"]
                if isinstance(self._refit, Whole):
                    report["num_bytes"] = self._refit.num_bytes
            return report
        except Exception as error:
            logging.getLogger("vllm.rlloop").exception("policy version %d", version)
            return report | {"error": str(error)}

    def refit_drop(self, version: int) -> None:
        """Free a version's slot."""
        if manager := getattr(self.model_runner, "lora_manager", None):
            manager.remove_adapter(version + 1)


class _InSlots:
    """Versions side by side, each in a slot of vLLM's LoRA layers."""

    def __init__(self, worker: Any) -> None:
        lora_manager = worker.model_runner.lora_manager
        self._arrivals = Arrivals(lora_manager.device, lora_manager.lora_config.lora_dtype)
        self._slots = Slots(lora_manager._adapter_manager)
        self._contents = torch.empty(0)
        """Of a slot, read back, flat; `_read_back` are its tensors."""
        self._read_back: list[torch.Tensor] = []
        self._read_back_as: Manifest = []
        self._parts: list[torch.Tensor] = []
        if lora_manager.device.type == "cpu":
            cpu_lora.install()
        else:
            gpu_lora.install(lora_manager._adapter_manager)

    def load(self, version: int, ticket: dict[str, Any]) -> dict[str, Any]:
        """Into a free slot, of which the report says what it holds."""
        self._slots.check_free(version + 1)
        manifest = ticket["manifest"]
        self._slots.arrange(manifest)
        with self._arrivals.stream():
            started = time.monotonic()
            flat = self._arrivals.take(ticket)
            transferred = self._arrivals.now()
            self._parts = self._slots.shares.of(flat)
            slot = self._slots.fill(version + 1, self._parts)
            loaded = self._arrivals.now()
            if self._slots.are_sharded:
                # The slots hold a part of what was sent: that all of it came, and that they hold their part of that.
                found, different = digest(flat, manifest), first_difference(manifest, self._parts, slot.views)
            else:
                if manifest != self._read_back_as:
                    self._contents, self._read_back_as = torch.empty_like(flat), manifest
                    self._read_back = split(self._contents, manifest)
                found = spelled(self._read(slot), manifest)
                different = None if found == ticket["digest"] else first_difference(manifest, self._parts, slot.views)
            return {
                "digest": found,
                "different": different,
                "transfer_seconds": transferred - started,
                "load_seconds": loaded - transferred,
                "verify_seconds": time.monotonic() - loaded,
            }

    def _read(self, slot: Slot) -> torch.Tensor:
        def read() -> torch.Tensor:
            torch._foreach_copy_(self._read_back, slot.views)
            return checksum(self._contents)

        return slot.check(read)

    def swap(self) -> str | None:
        """Give requests that hop what was loaded last; on the stream of the forward passes, of which one may still read it."""
        slot = self._slots.fill(HOPPING_ID, self._parts)
        return first_difference(self._slots.manifest, self._parts, slot.views)
