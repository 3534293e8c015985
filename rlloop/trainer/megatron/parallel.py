"""How many ranks there are, what each is, and the groups in which they talk."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from rlloop.config import MegatronSettings
from rlloop.errors import TrainerError
from rlloop.meeting import open_store
from rlloop.trainer.megatron import compat  # noqa: F401  (before anything under megatron)

from megatron.core import parallel_state, tensor_parallel  # isort: skip

_TIMEOUT = datetime.timedelta(minutes=10)
"""After which a rank that waits for another gives up, and so ends the run."""


@dataclass(frozen=True, slots=True)
class Groups:
    """Process groups and this rank's place in them."""

    rank: int
    device: torch.device
    tp: Any
    pp: Any
    dp: Any
    model: Any
    """All ranks of one copy of the model."""
    control: Any
    """All ranks, for Python objects."""

    @property
    def tp_size(self) -> int:
        """Tensor-parallel ranks."""
        return int(self.tp.size())

    @property
    def tp_rank(self) -> int:
        """Among the tensor-parallel ranks."""
        return int(self.tp.rank())

    @property
    def pp_size(self) -> int:
        """Pipeline stages."""
        return int(self.pp.size())

    @property
    def pp_rank(self) -> int:
        """This stage."""
        return int(self.pp.rank())

    @property
    def dp_size(self) -> int:
        """Copies of the model."""
        return int(self.dp.size())

    @property
    def dp_rank(self) -> int:
        """Which copy."""
        return int(self.dp.rank())

    @property
    def first_stage(self) -> int:
        """The rank of the first stage of this pipeline."""
        return int(dist.get_global_rank(self.pp, 0))

    @property
    def is_last_stage(self) -> bool:
        """Whether the losses are computed here."""
        return self.pp_rank == self.pp_size - 1

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's, on every rank."""
        if dist.get_world_size() == 1:
            return [value]
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self.control)
        return values


def _meet(address: str, rank: int) -> dist.Store:
    host, _, port = address.partition(":")
    if rank == 0:
        return open_store(host, int(port), _TIMEOUT)
    return dist.TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=_TIMEOUT)


def start_groups(settings: MegatronSettings, rank: int, num_ranks: int, address: str, seed: int) -> Groups:
    """Meet the other ranks at `address` (host:port); NCCL on GPUs, gloo on CPUs."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if torch.cuda.device_count() < num_ranks:
            raise TrainerError(
                f"--trainer.megatron: expected a GPU for each of tensor x pipeline x data parallel = {num_ranks} ranks, "
                f"got {torch.cuda.device_count()}"
            )
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    else:
        from rlloop.trainer.megatron.cuda_on_cpu import install

        install()
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=_meet(address, rank),
        rank=rank,
        world_size=num_ranks,
        timeout=_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=settings.tensor_parallel,
        pipeline_model_parallel_size=settings.pipeline_parallel,
        virtual_pipeline_model_parallel_size=settings.virtual_stages if settings.virtual_stages > 1 else None,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=_TIMEOUT.seconds // 60,
    )
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return Groups(
        rank=rank,
        device=device,
        tp=parallel_state.get_tensor_model_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        dp=parallel_state.get_data_parallel_group(),
        model=parallel_state.get_model_parallel_group(),
        control=dist.new_group(backend="gloo", timeout=_TIMEOUT),
    )
