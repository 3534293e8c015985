"""All that crosses a stage of the pipeline, as immutable data.

    Prompt ──▶ Rollout ──▶ Group (scored) ──▶ Sample ──▶ trainer ──▶ AdapterTicket ──▶ engine

Shapes: T tokens of one sequence. Arrays are numpy, so that neither the event loop nor an environment needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]
FinishReason = Literal["stop", "length"]
Message = Mapping[str, Any]
Metrics = dict[str, float]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question to the policy, at its place in the run's order."""

    ordinal: int
    """Counts prompts over the whole run; (epoch, place in the epoch's permutation) follow from it."""
    index: int
    """Which of the environment's tasks this is."""
    seed: int
    """From (run seed, ordinal): a prompt that is sampled again after a resume is sampled with the same seeds."""
    task: Any
    """What `Environment.task(index)` gave, picklable; a Failure where it raised."""


InFlight: TypeAlias = Literal["finish", "restart", "hop"]
"""What becomes of a request when a version is published that is newer than the one it began with.

`finish`: nothing. `restart`: it ends; prompt and what it has sampled so far are prefilled by the new version, which goes on.
`hop`: the new version goes on at once, over the keys and values that the old one left."""

RefitForm: TypeAlias = Literal["adapter", "merged", "full"]
"""What an engine holds: adapters, of which it serves several versions at once; or weights with the newest merged into them, by
the engine's workers or by the trainer, which then sends all of them."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What one call asks of an engine."""

    tokens: tuple[int, ...]
    policy_version: int
    """That samples it; unless `in_flight` is `finish`, the engine's newest does, which is at least this."""
    max_tokens: int
    temperature: float = 1.0
    n: int = 1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    in_flight: InFlight = "finish"
    group: int | None = None
    """Requests of one group and version begin alike: of several engines one gets them all, whose prefix cache they share."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine sampled for one request."""

    tokens: IntArray
    """[T] with the stop token, if one ended it."""
    logprobs: FloatArray
    """[T] log-probability of each token under the distribution that it was drawn from (at the sampling temperature)."""
    policy_version: int
    """The oldest that sampled a token of it."""
    finish_reason: FinishReason
    token_versions: IntArray | None = None
    """[T] the version that sampled each token; None where one sampled them all."""

    @property
    def versions(self) -> IntArray:
        """[T] the version that sampled each token."""
        if self.token_versions is not None:
            return self.token_versions
        return np.full(len(self.tokens), self.policy_version, np.int32)


@dataclass(frozen=True, slots=True)
class Rollout:
    """One complete trajectory as one flat token sequence: prompt, completions, and what the environment said between them."""

    tokens: IntArray
    """[T]"""
    loss_mask: BoolArray
    """[T] true where the policy sampled the token."""
    rollout_logprobs: FloatArray
    """[T] the engine's logprobs; 0 where `loss_mask` is false."""
    policy_version: int
    """The oldest version that sampled a token of it."""
    finish_reason: str
    """`stop`, `length`, or what the environment ended it with (`max_turns`)."""
    num_turns: int
    text: str
    """What the policy wrote last, decoded without special tokens: what a reward reads."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What the environment wants to see logged, as `env/<name>`."""
    token_versions: IntArray | None = None
    """[T] the version that sampled each token, `policy_version` where none did; None where one sampled them all."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A rollout that did not end or could not be scored. It is counted and has no reward."""

    kind: Literal["error", "timeout"]
    stage: Literal["task", "rollout", "score"]
    message: str


class Reward(float):
    """A reward that says what it is made of; a float, so that whoever only wants that need not know.

    `parts`: by name, such as that of a reward function, before any weighing; logged as `reward/<name>/mean`.
    """

    __slots__ = ("parts",)

    def __new__(cls, value: float, parts: Mapping[str, float]) -> Reward:
        """The sum and its parts."""
        reward = super().__new__(cls, value)
        reward.parts = dict(parts)
        return reward

    def __getnewargs__(self) -> tuple[float, Mapping[str, float]]:  # type: ignore[override]
        return float(self), self.parts

    parts: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Group:
    """The scored rollouts of one prompt."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    rewards: tuple[float, ...]
    """Of the rollouts, in their order; some may be a `Reward`."""
    policy_version: int
    """The newest when the group began: no token is older."""
    failures: tuple[Failure, ...] = ()
    staleness: int = 0
    """Versions that the trainer is ahead of `policy_version`, once the group is taken for a step."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One flat sequence as the trainer sees it. All arrays are [T]; entry t belongs to the token at position t."""

    tokens: IntArray
    loss_mask: BoolArray
    rollout_logprobs: FloatArray
    advantages: FloatArray
    loss_weights: FloatArray
    """What a token's loss counts: 1 / (tokens of the batch), or 1 / (samples x tokens of this one). A loss is a plain sum, so
    that neither microbatches nor ranks change it."""
    prompt_id: int
    """Samples with equal ids may share the computation of the tokens before their first `loss_mask`."""
    old_logprobs: FloatArray | None = None
    ref_logprobs: FloatArray | None = None
    old_values: FloatArray | None = None
    """A value adapter's, before the update."""
    returns: FloatArray | None = None
    """What its values should be."""
    staleness: FloatArray | None = None
    """Versions that the trainer is ahead of the one that sampled the token."""


Transport: TypeAlias = Literal["cuda_ipc", "memory", "broadcast", "disk"]
"""How an adapter gets to the engine; see `rlloop.refit.transports`."""


Manifest: TypeAlias = Sequence[tuple[str, Sequence[int]]]
"""Names and shapes of tensors that lie flat, in their order; of an adapter's, PEFT's names."""


@dataclass(frozen=True, slots=True)
class AdapterTicket:
    """Everything about an exported LoRA adapter but its bytes, which lie flat, in the order of `manifest`, at `location`.

    B is scaled by alpha / rank already, so that an engine's slot holds exactly the bytes that were sent."""

    manifest: Manifest
    dtype: str
    digest: str
    transport: Transport
    location: str
    num_bytes: int
    export_seconds: float


@dataclass(frozen=True, slots=True)
class WeightsTicket:
    """Where the trainer hands out whole weights. Each bucket of them comes with a digest of its own."""

    location: str
    """See `rlloop.refit.stream`."""
    digest: str = ""
    num_bytes: int = 0
    export_seconds: float = 0.0


Ticket: TypeAlias = AdapterTicket | WeightsTicket


@dataclass(frozen=True, slots=True)
class RefitReport:
    """What publishing one policy version cost, in seconds."""

    policy_version: int
    num_bytes: int
    export_seconds: float
    """In the trainer: flatten, scale, cast, digest."""
    transfer_seconds: float
    """In the engine's worker: from the transport to a tensor on its device."""
    load_seconds: float
    """In the worker: into a free slot."""
    verify_seconds: float
    """In the worker: digest of what the slot holds."""
    publish_seconds: float
    """The whole, as the event loop saw it, export included."""

    @classmethod
    def interrupted(cls, policy_version: int) -> RefitReport:
        """Of a publish that did not end: no size, and NaN for all times."""
        return cls(policy_version, 0, *[float("nan")] * 5)

    @property
    def stall_seconds(self) -> float:
        """How long the worker could not run a forward pass."""
        return self.transfer_seconds + self.load_seconds + self.verify_seconds


@dataclass(frozen=True, slots=True)
class OptimResult:
    """One optimizer step."""

    grad_norm: float
    """Before clipping; not finite when the step was skipped for that reason."""
    skipped: bool


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """Totals since the engine started, and the present load."""

    num_generated_tokens: int
    busy_seconds: float
    """Time with at least one request in flight; of several engines, their mean."""
    num_running: int
    num_waiting: int
    kv_cache_usage: float
    longest_gap_seconds: float
    """Longest time between two tokens of one request since `reset_longest_gap`."""
    first_token_seconds: Mapping[int, float]
    """Per policy version, from the end of its publish to the first token that it sampled."""


@dataclass(frozen=True, slots=True)
class AdamConfig:
    """One AdamW step (Loshchilov & Hutter 2019)."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """A LoRA adapter (Hu et al. 2021): W x + (alpha / rank) B A x on each target."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    seed: int = 0
    dropout: float = 0.0
    """Of A's input while it is trained. The policy that learns is then another one than the one that sampled."""
    dora: bool = False
    """Learn each row's norm apart from its direction (Liu et al. 2024)."""
