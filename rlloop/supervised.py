"""From rows of a dataset, in TRL's conventions, to samples for supervised training. Numpy and the tokenizer only.

    prompt, completion   two strings, or two lists of messages       loss on the completion
    messages             a chat                                      loss on the assistant's turns
    text                 a string                                    loss on all of it but its first token

The first of these that a dataset has is read; other columns are not. A chat becomes the tokens that a rollout of it in an
environment would have (`rlloop.environment.MessageEnvironment`): the turns that carry loss are those that the policy would
sample, each up to the token that ends it. Strings end with the tokenizer's end-of-sequence token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlloop.advantages import token_weights
from rlloop.environment import as_written, prompt_tokens, reply_tokens
from rlloop.errors import ConfigError
from rlloop.types import BoolArray, IntArray, Message, Sample

COLUMNS = (("prompt", "completion"), ("messages",), ("text",))


@dataclass(frozen=True, slots=True)
class Example:
    """One row, tokenised. It ends with the last token that carries loss."""

    tokens: IntArray
    """[T]"""
    loss_mask: BoolArray
    """[T] true where the policy is to learn the token."""


@dataclass(frozen=True, slots=True)
class Examples:
    """A dataset, tokenised, in its order."""

    kept: tuple[Example, ...]
    num_too_long: int
    num_empty: int
    """Rows without a token to learn."""

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of all tokens, and of which carry loss."""
        sha = hashlib.sha256()
        for example in self.kept:
            sha.update(len(example.tokens).to_bytes(8, "little") + example.tokens.tobytes())
            sha.update(example.loss_mask.tobytes())
        return sha.hexdigest()


def tokenise(rows: Any, tokenizer: Any, max_length: int) -> Examples:
    """All rows of a `datasets.Dataset`; those of more than `max_length` tokens are left out, and counted.

    Raises ConfigError for a dataset without the columns, without a row that is left, or with a row that is not as its columns
    say, or that the chat template refuses.
    """
    columns = next((names for names in COLUMNS if set(names) <= set(rows.column_names)), None)
    if columns is None:
        expected = ", or ".join(" and ".join(names) for names in COLUMNS)
        raise ConfigError(
            f"--dataset: expected the columns {expected}, got {', '.join(rows.column_names) or 'none'}; rename the columns that "
            "have the questions and answers"
        )
    found: list[Example] = []
    for index, row in enumerate(rows.select_columns(list(columns))):
        try:
            found.append(_example(row, tokenizer))
        except Exception as error:  # a template raises what it likes
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise ConfigError(f"--dataset: row {index}: {reason}") from error
    learnable = [example for example in found if example.loss_mask.any()]
    kept = tuple(example for example in learnable if len(example.tokens) <= max_length)
    if not kept:
        lengths = [len(example.tokens) for example in learnable]
        why = (
            f"all {len(lengths)} are longer than --max-length {max_length} tokens (the shortest has {min(lengths)})"
            if lengths
            else f"{len(found)} rows hold nothing to learn"
        )
        raise ConfigError(f"--dataset: expected rows to train on, got none: {why if found else 'it is empty'}")
    return Examples(kept, len(learnable) - len(kept), len(found) - len(learnable))


def make_samples(examples: Sequence[Example], ids: Sequence[int]) -> list[Sample]:
    """Of one batch, every token that carries loss counting the same: see `rlloop.losses.negative_log_likelihood`.

    `ids` differ, so that nothing is shared between samples. Nobody sampled the tokens: advantages are 1, rollout_logprobs 0.
    """
    weights = token_weights([int(example.loss_mask.sum()) for example in examples])
    return [
        Sample(
            tokens=example.tokens,
            loss_mask=example.loss_mask,
            rollout_logprobs=np.zeros(len(example.tokens), np.float32),
            advantages=np.ones(len(example.tokens), np.float32),
            loss_weights=np.full(len(example.tokens), weight, np.float32),
            prompt_id=prompt_id,
        )
        for example, weight, prompt_id in zip(examples, weights, ids, strict=True)
    ]


def _example(row: Mapping[str, Any], tokenizer: Any) -> Example:
    if "completion" in row:
        pieces = _completed(row["prompt"], row["completion"], tokenizer)
    elif "messages" in row:
        pieces = _turns([], _chat("messages", row["messages"]), tokenizer)
    else:
        text = _ended(_encode(tokenizer, _string("text", row["text"])), tokenizer)
        pieces = [(text[:1], False), (text[1:], True)]  # nothing predicts the first
    tokens = [token for piece, _ in pieces for token in piece]
    loss_mask = [carries_loss for piece, carries_loss in pieces for _ in piece]
    return Example(np.array(tokens, np.int32), np.array(loss_mask, np.bool_))


_Pieces = list[tuple[list[int], bool]]
"""Tokens, and whether they carry loss."""


def _completed(prompt: Any, completion: Any, tokenizer: Any) -> _Pieces:
    if isinstance(prompt, str) != isinstance(completion, str):
        raise ValueError(
            f"expected prompt and completion to be both strings or both lists of messages, got {type(prompt).__name__} "
            f"and {type(completion).__name__}"
        )
    if not isinstance(prompt, str):
        return _turns(_chat("prompt", prompt), _chat("completion", completion), tokenizer)
    if not prompt:
        raise ValueError("expected a prompt, got an empty string; the column text has what no prompt comes before")
    # Each by itself, for the policy will continue the prompt's own tokens; together where that is the same (a tokenizer may put a
    # space before what it takes for the first word).
    begin, whole = _encode(tokenizer, prompt), _encode(tokenizer, prompt + completion)
    answer = (
        whole[len(begin) :] if whole[: len(begin)] == begin else tokenizer.encode(completion, add_special_tokens=False)
    )
    return [(begin, False), (_ended(answer, tokenizer), True)]


def _turns(prompt: Sequence[Message], chat: Sequence[Message], tokenizer: Any) -> _Pieces:
    """The prompt, then the chat, whose assistant turns carry loss, up to the last of them."""
    messages = [*prompt, *chat]
    places = [place for place in range(len(prompt), len(messages)) if messages[place]["role"] == "assistant"]
    if not places:
        raise ValueError(f"expected an assistant's message, got the roles {[message['role'] for message in chat]}")
    pieces: _Pieces = [(prompt_tokens(tokenizer, messages[: places[0]]), False)]
    for place, following in zip(places, [*places[1:], None], strict=True):
        answer = _answer_tokens(tokenizer, messages[:place], messages[place])
        pieces.append((answer, True))
        if following is not None:
            told = reply_tokens(tokenizer, messages[:place], messages[place + 1 : following], answer[-1])
            pieces.append((told, False))
    return pieces


def _answer_tokens(tokenizer: Any, before: Sequence[Message], answer: Message) -> list[int]:
    """What the policy would have to sample after `before` to give that answer: up to the token that ends the turn."""
    begin: str = tokenizer.apply_chat_template(list(before), add_generation_prompt=True, tokenize=False)
    whole: str = tokenizer.apply_chat_template([*before, answer], tokenize=False)
    without = {key: value for key, value in answer.items() if key != "tool_calls"}
    if answer.get("tool_calls") and whole == tokenizer.apply_chat_template([*before, without], tokenize=False):
        raise ValueError("expected a chat template that writes tool_calls, but this one leaves them out of an answer")
    if not whole.startswith(begin):
        raise ValueError(
            "expected the chat template to write an answer after its own generation prompt, but that ends with "
            f"{begin[-40:]!r} and the answer is rendered otherwise ({whole[-80:]!r}); give prompt and completion as strings, as "
            "the template should have written them"
        )
    tokens: list[int] = tokenizer.encode(whole[len(begin) :], add_special_tokens=False)
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    last = max((place for place, token in enumerate(tokens) if token in special), default=-1)
    if last < 0 or tokenizer.decode(tokens[last + 1 :]).strip():
        return _ended(tokens, tokenizer)  # a template without a token that ends a turn
    return tokens[: last + 1]  # a line break may follow, which nobody samples


def _ended(tokens: list[int], tokenizer: Any) -> list[int]:
    """With the end-of-sequence token, from which the policy learns to stop."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token, so the policy could not learn to stop; set it in its files")
    return tokens if tokens[-1:] == [tokenizer.eos_token_id] else [*tokens, tokenizer.eos_token_id]


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])


def _string(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected {name} to be a string, got {type(value).__name__}")
    return value


def _chat(name: str, value: Any) -> list[Message]:
    if not isinstance(value, list) or not all(isinstance(message, dict) and "role" in message for message in value):
        raise ValueError(f"expected {name} to be a list of messages with role and content, got {value!r:.80}")
    return as_written(value)
