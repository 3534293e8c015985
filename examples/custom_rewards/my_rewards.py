"""Reward functions as TRL takes them: lists in, a list out, every column of the dataset by its name."""


def right(completions, answer, **_):
    """1 where the answer is in the completion."""
    return [float(a in c[0]["content"].lower()) for c, a in zip(completions, answer, strict=True)]


def brief(completions, **_):
    """1 for one word, less for more."""
    return [1 / max(len(c[0]["content"].split()), 1) for c in completions]
