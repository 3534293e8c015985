import numpy as np
import pytest
import torch

from rlloop.refit.digest import ODD, PIECE, digest

NAMES = [("a", (2, 3)), ("b", (4, 1))]


def of(values: torch.Tensor) -> str:
    return digest(values, NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 3, 10, 2**17 + 5, 2**18])  # no whole word; one piece; several
def test_it_is_the_weighted_sum_of_words(dtype: torch.dtype, size: int) -> None:
    flat = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    # The definition, in Python's own integers: pad to whole words, weigh word i with i * ODD, made odd.
    payload = flat.view(torch.uint8).numpy().tobytes()
    words = np.frombuffer(payload + b"\0" * (-len(payload) % 8), dtype="<u8")[:3000]
    if len(payload) <= 8 * 3000:
        total = sum(int(word) * ((place * ODD) % 2**64 | 1) for place, word in enumerate(words)) % 2**64
        assert of(flat).endswith(f"-{total:016x}")
    assert of(flat) == of(flat.clone())


@pytest.mark.parametrize("place", [0, 1, 2**16 - 1, 2**16, 2**17 + 4])
@pytest.mark.parametrize("bit", [0, 15, 31])
def test_one_bit_changes_it(place: int, bit: int) -> None:
    flat = torch.randn(2**17 + 5)
    before = of(flat)
    flat.view(torch.int32)[place] ^= 1 << bit if bit < 31 else -(2**31)
    assert of(flat) != before


@pytest.mark.parametrize(("one", "other"), [(0, 2), (1, 2**17), (2**16 - 2, 2**16)])
def test_swapped_values_change_it(one: int, other: int) -> None:
    flat = torch.randn(2**17 + 5)
    before = of(flat)
    flat[[one, other]] = flat[[other, one]]
    assert of(flat) != before


def test_names_and_shapes_change_it() -> None:
    flat = torch.zeros(10)
    different = {
        digest(flat, manifest)
        for manifest in (NAMES, NAMES[::-1], [("c", (2, 3)), ("b", (4, 1))], [("a", (3, 2)), ("b", (4, 1))], NAMES[:1])
    }
    assert len(different) == 5


def test_tuples_and_lists_are_equal() -> None:
    """A ticket's manifest arrives in the worker as lists."""
    assert digest(torch.ones(10), NAMES) == digest(torch.ones(10), [["a", [2, 3]], ["b", [4, 1]]])


def test_zeros_and_a_missing_tail_differ() -> None:
    values = torch.randn(8)
    assert of(values) != of(values[:6])
    assert of(torch.zeros(2)).endswith("-" + "0" * 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_that_change_places_change_it(dtype: torch.dtype) -> None:
    size = PIECE * 8 // dtype.itemsize
    flat = torch.randn(3 * size, generator=torch.Generator().manual_seed(0)).to(dtype)
    first, second, third = flat.split(size)
    orders = [(first, second, third), (second, first, third), (first, third, second), (third, second, first)]
    assert len({of(torch.cat(order)) for order in orders}) == 4
