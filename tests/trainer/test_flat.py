import pickle
from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import pytest

from rlloop.trainer.flat import Flat
from rlloop.types import Sample

MakeSamples = Callable[..., list[Sample]]


def assert_equal(found: list[Sample], expected: list[Sample]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for field in fields(Sample):
            ours, theirs = getattr(one, field.name), getattr(other, field.name)
            np.testing.assert_array_equal(ours, theirs)
            assert getattr(ours, "dtype", None) == getattr(theirs, "dtype", None)


@pytest.mark.parametrize("with_old", ["none", "some", "all"])
def test_what_arrives_is_what_was_sent(make_samples: MakeSamples, with_old: str) -> None:
    samples = [
        replace(sample, old_logprobs=sample.rollout_logprobs + 1)
        if with_old == "all" or (with_old == "some" and index)
        else sample
        for index, sample in enumerate(make_samples())
    ]
    assert_equal(pickle.loads(pickle.dumps(Flat(samples))), samples)


def test_no_samples() -> None:
    assert pickle.loads(pickle.dumps(Flat([]))) == []
