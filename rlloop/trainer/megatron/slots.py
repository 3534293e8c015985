"""Where the weights of an adapter lie in its flat buffers.

    [ head | whole A | whole B | whole m | cut A | cut B | cut m ]     whole: the same on all tensor-parallel ranks

The head, a value adapter's, is whole, too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rlloop.trainer.megatron.lora import LoraLinear
from rlloop.types import LoraConfig


@dataclass(frozen=True, slots=True)
class Projection:
    """A linear layer of the Hugging Face model: some rows of a layer of Megatron's."""

    name: str
    """PEFT's, without `.lora_A.weight`."""
    rows: Tensor | None
    """This rank's rows of it, in its own order, as indices into Megatron's; None: all, as they lie."""

    @property
    def own_rows(self) -> Tensor | slice:
        """`rows`, to index with."""
        return slice(None) if self.rows is None else self.rows

    @property
    def target(self) -> str:
        """What `LoraConfig.targets` calls it: q_proj."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class AdaptableLayer:
    """A layer of Megatron's on this rank, and what it holds."""

    layer: LoraLinear
    projections: tuple[Projection, ...]


@dataclass(frozen=True, slots=True)
class Slot:
    """Where an adapted layer's A [R, I], B [O, R] and m [O] lie in the flat buffers."""

    layer: LoraLinear
    projections: tuple[Projection, ...]
    a: slice
    b: slice
    m: slice
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """Of one rank's flat buffers."""

    slots: list[Slot]
    num_whole: int
    """The head included; 0 where nothing is shared by several ranks."""
    b_slices: list[slice]
    """Where all B lie."""
    num_parameters: int


def lay_out(lora: LoraConfig, layers: Sequence[AdaptableLayer], tp_size: int, num_head: int) -> Layout:
    """Place the adapter of the layers that `lora` names, and `num_head` weights of a head."""
    wanted = [
        (adaptable.layer, projections)
        for adaptable in layers
        if (projections := tuple(p for p in adaptable.projections if p.target in lora.targets))
    ]
    shapes: dict[tuple[int, str], tuple[int, ...]] = {}
    for index, (layer, projections) in enumerate(wanted):
        num_outputs, num_inputs = layer.weight.shape
        stacked = lora.rank * len(projections)
        shapes[index, "a"], shapes[index, "b"] = (stacked, num_inputs), (num_outputs, stacked)
        shapes[index, "m"] = (num_outputs if lora.dora else 0,)
    regions: dict[tuple[bool, str], list[tuple[int, str]]] = {
        (whole, kind): [] for whole, kind in itertools.product((True, False), "abm")
    }
    for index, kind in shapes:
        whole = tp_size > 1 and (kind == "a") == wanted[index][0].is_column
        regions[whole, kind].append((index, kind))
    places: dict[tuple[int, str], slice] = {}
    b_slices, num_whole, end = [], num_head if tp_size > 1 else 0, num_head
    for (whole, kind), keys in regions.items():
        start = end
        for key in keys:
            places[key] = slice(end, end + math.prod(shapes[key]))
            end = places[key].stop
        if kind == "b":
            b_slices.append(slice(start, end))
        if whole and tp_size > 1:
            num_whole = end
    slots = [
        Slot(layer, projections, places[i, "a"], places[i, "b"], places[i, "m"], shapes[i, "a"], shapes[i, "b"])
        for i, (layer, projections) in enumerate(wanted)
    ]
    return Layout(slots, num_whole, b_slices, end)
