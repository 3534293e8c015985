"""How fast is a LoRA step (forward, backward, AdamW; all linear layers) of the megatron trainer, beside others on one device?

    python benchmarks/trainer.py                          # one H200: the shapes of Llama-3-8B, Qwen2.5-1.5B, SmolLM2-135M
    python benchmarks/trainer.py --shapes tiny --steps 3  # on a CPU, to rehearse
    python benchmarks/trainer.py --shapes 8b --rows 8 --trainers megatron TP2 PP2 DP2       # two GPUs

Random weights; every step goes through the Trainer protocol, with its own process and Megatron's schedule. Samples with
prompts of their own, loss on the last two thirds. MFU = 4 N T / (seconds x 790 TFLOP/s): N all parameters, T the tokens
computed (2 N T forward, 2 N T backward to the activations, since the base is frozen).

    megatron            the trainer as it is
    megatron's layer    the same, with Megatron-Core's own transformer layer in place of FastLayer
    peft                the peft trainer
    varying             the megatron trainer on rows of varying lengths
    with a critic       the megatron trainer: the step of a policy, then one of a value adapter beside it
    TP2, PP2, TP2xPP2 …  the megatron trainer on several devices; tokens/s of all of them, MFU of one, GB of the fullest

A step is `--rows` microbatches of the shape's samples.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import torch
from _report import Cell, Report

from rlloop.config import MegatronSettings, TrainerSettings
from rlloop.trainer import TokenBatch
from rlloop.trainer.megatron import MegatronTrainer
from rlloop.trainer.peft import PeftTrainer
from rlloop.trainer.rank_trainer import RankTrainer
from rlloop.trainer.ranks import RankContext
from rlloop.types import AdamConfig, AdapterTicket, LoraConfig, Sample

LORA = LoraConfig(rank=32, alpha=64.0)
ADAM = AdamConfig(lr=1e-5)
PEAK_FLOPS = 790e12
CUDA = torch.cuda.is_available()


@dataclass(frozen=True)
class Shape:
    kind: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tied: bool
    num_samples: int
    length: int


SHAPES = {
    "8b": Shape("Llama", 128256, 4096, 14336, 32, 32, 8, False, 8, 1024),
    "1.5b": Shape("Qwen2", 151936, 1536, 8960, 28, 12, 2, True, 16, 1024),
    "135m": Shape("Llama", 49152, 576, 1536, 30, 9, 3, True, 32, 512),
    "tiny": Shape("Qwen2", 512, 64, 192, 2, 4, 2, True, 3, 32),
}


def write_model(shape: Shape, folder: Path) -> int:
    """A random model in transformers' format; -> its number of parameters."""
    import transformers

    fields = {k: v for k, v in vars(shape).items() if k not in ("kind", "tied", "num_samples", "length")}
    config = getattr(transformers, f"{shape.kind}Config")(
        **fields, tie_word_embeddings=shape.tied, max_position_embeddings=8192, bos_token_id=0, eos_token_id=1
    )
    torch.manual_seed(0)
    with torch.device("cuda" if CUDA else "cpu"):
        model = getattr(transformers, f"{shape.kind}ForCausalLM")._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def make_samples(shape: Shape, lengths: list[int]) -> list[Sample]:
    generator = np.random.default_rng(0)
    num_loss_tokens = sum(length - length // 3 for length in lengths)
    samples = []
    for index, length in enumerate(lengths):
        samples.append(
            Sample(
                tokens=generator.integers(0, shape.vocab_size, length).astype(np.int32),
                loss_mask=np.arange(length) >= length // 3,
                rollout_logprobs=np.zeros(length, dtype=np.float32),
                advantages=np.full(length, generator.normal(), dtype=np.float32),
                loss_weights=np.full(length, 1 / num_loss_tokens, dtype=np.float32),
                prompt_id=index,
            )
        )
    return samples


def varying(shape: Shape, step: int) -> list[int]:
    """As many tokens as the shape's row, in samples of a quarter of its length up to all of it."""
    generator = np.random.default_rng(step)
    lengths: list[int] = []
    room = shape.num_samples * shape.length
    while room > 0:
        lengths.append(min(room, int(generator.integers(shape.length // 4, shape.length + 1))))
        room -= lengths[-1]
    if lengths[-1] < 8:
        lengths[-2] += lengths.pop()
    return lengths


def policy_gradient(logprobs: torch.Tensor, tokens: TokenBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return -(tokens.loss_weights * tokens.advantages * logprobs).sum(), {}


def squared_errors(values: torch.Tensor, tokens: TokenBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return (tokens.loss_weights * (values - tokens.advantages).square()).sum(), {}


def with_megatrons_layer(context: RankContext, **arguments: Any) -> object:
    from rlloop.trainer.megatron import model

    model.FastLayer = model.TransformerLayer  # type: ignore[attr-defined]
    return MegatronTrainer.build_rank(context, **arguments)


class MegatronsLayerTrainer(MegatronTrainer):
    """With Megatron-Core's transformer layer for FastLayer."""

    build_rank = staticmethod(with_megatrons_layer)


def parse_layout(kind: str) -> MegatronSettings:
    sizes = {name: int(size) for name, size in re.findall(r"(TP|PP|DP)(\d+)", kind)}
    return MegatronSettings(
        tensor_parallel=sizes.get("TP", 1), pipeline_parallel=sizes.get("PP", 1), data_parallel=sizes.get("DP", 1)
    )


def make_trainer(kind: str, folder: Path, shape: Shape) -> RankTrainer:
    settings = TrainerSettings(
        kind="peft" if kind == "peft" else "megatron",
        max_tokens_per_microbatch=shape.num_samples * shape.length,
        megatron=parse_layout(kind),
    )
    make = {"peft": PeftTrainer, "megatron's layer": MegatronsLayerTrainer}.get(kind, MegatronTrainer)
    return make(
        str(folder),
        dtype="bfloat16" if CUDA else "float32",
        settings=settings,
        temperature=1.0,
        writer=NoWriter(),
        log_path=folder / f"{kind}.log",
    )


class NoWriter:
    """Exports nothing."""

    def write(self, tensors: Mapping[str, torch.Tensor], scale: float) -> AdapterTicket:
        raise NotImplementedError

    def close(self) -> None:
        pass


async def measure(
    kind: str, folder: Path, shape: Shape, num_steps: int, num_rows: int, num_parameters: int
) -> dict[str, Cell]:
    lengths = [[shape.length] * shape.num_samples * num_rows]
    if kind == "varying":
        lengths = [
            [length for row in range(num_rows) for length in varying(shape, step * num_rows + row)]
            for step in range(num_steps)
        ]
    batches = [make_samples(shape, each) for each in lengths]
    seconds, inside, rates, losses, found = [], [], [], [], {}
    async with make_trainer(kind, folder, shape) as trainer:
        await trainer.create_adapter("policy", LORA)
        if kind == "with a critic":
            await trainer.create_adapter("critic", LORA, head="value")
        for step in range(num_steps + 3):
            batch = batches[step % len(batches)]
            started = time.perf_counter()
            found = await trainer.forward_backward("policy", batch, policy_gradient)
            await trainer.optim_step("policy", ADAM)
            if kind == "with a critic":
                critic = await trainer.forward_backward("critic", batch, squared_errors)
                await trainer.optim_step("critic", ADAM)
                found["peak_memory_gib"] = critic["peak_memory_gib"]
            if step >= 3:
                seconds.append(time.perf_counter() - started)
                inside.append(found["forward_backward_seconds"])
                rates.append(found["num_computed_tokens"] / seconds[-1])
            losses.append(found["loss"])
    rate = statistics.median(rates)
    return {
        "trainer": kind,
        "ms/step": 1e3 * statistics.median(seconds),
        "slowest": 1e3 * max(seconds),
        "forward_backward in the rank": 1e3 * statistics.median(inside),
        "tokens/s": rate,
        "MFU": 4 * num_parameters * rate / PEAK_FLOPS / parse_layout(kind).num_ranks if CUDA else None,
        "GB": found.get("peak_memory_gib", 0.0) * 1.0737 or None,
        "first loss": losses[0],
        "last loss": losses[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["8b", "1.5b", "135m"], choices=list(SHAPES))
    parser.add_argument("--trainers", nargs="+", default=["megatron", "varying", "megatron's layer", "peft"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rows", type=int, default=1)
    arguments = parser.parse_args()
    report = Report("trainer", ("torch", "megatron-core", "megatron-bridge", "transformers", "peft"))
    for name in arguments.shapes:
        shape = SHAPES[name]
        folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
        try:
            num_parameters = write_model(shape, folder)
            torch.cuda.empty_cache()
            rows = []
            for kind in arguments.trainers:
                try:
                    row = anyio.run(measure, kind, folder, shape, arguments.steps, arguments.rows, num_parameters)
                    rows.append(row)
                    print(f"{name}, {kind}: {row['ms/step']:.1f} ms a step", file=sys.stderr)
                except Exception as error:
                    report.line(f"{name}, {kind}: {error}")
                    log = folder / f"{kind}.log"
                    print(log.read_text()[-3000:] if log.exists() else "")
            if rows:
                tokens = f"{arguments.rows} x {shape.num_samples} x {shape.length} tokens"
                title = f"{name}: {tokens}, {num_parameters / 1e9:.3f}e9 parameters"
                report.table(title, rows, {"MFU": "{:.3f}", "first loss": "{:.5f}", "last loss": "{:.5f}"})
        finally:
            shutil.rmtree(folder)
    report.write()


if __name__ == "__main__":
    main()
