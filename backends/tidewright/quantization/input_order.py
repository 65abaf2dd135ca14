"""Weights whose groups are not of neighbouring inputs, as GPTQ in the order of activations makes them.

A group's columns are put side by side, and the inputs are gathered in their order: so the products need not know.
"""

# ruff: noqa: N815 - fields, too, carry their shape

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tidewright.quantization.order_parts import part_bits, part_sizes

_NO_INPUT = -1


@dataclass(frozen=True)
class InputOrder:
    inputs_E: torch.Tensor
    """int64: the input of each column of the codes; -1: none, as the column only fills up its group."""
    count: int
    """Inputs of the layer, or of a rank's cut of it."""

    def gather(self, x_TI: torch.Tensor) -> torch.Tensor:
        """[T, E]: an input for each column."""
        return F.pad(x_TI, (0, 1))[:, self.inputs_E]

    def scatter(self, weight_FE: torch.Tensor) -> torch.Tensor:
        """[F, I]: the columns in the order of inputs."""
        is_used_E = self.inputs_E != _NO_INPUT
        weight_FI = weight_FE.new_zeros(len(weight_FE), self.count)
        weight_FI[:, self.inputs_E[is_used_E]] = weight_FE[:, is_used_E]
        return weight_FI

    @property
    def key(self) -> tuple[int, ...]:
        """Equal for equal orders."""
        return (self.count, *self.inputs_E.tolist())


def by_group(groups_I: torch.Tensor, size: int, bits: int) -> tuple[InputOrder, torch.Tensor, int]:
    """The order, the group of each `size'` columns in it, and size'.

    `groups_I`: of each input its group, whose inputs are `size` at most; of a weight of so many bits. A rank has only
    some inputs of each group: groups are then cut into smaller parts, and the last part of each is filled up.
    """
    inputs_E = torch.argsort(groups_I, stable=True)
    found_G, counts_G = torch.unique(groups_I, return_counts=True)
    if bool((counts_G[:-1] == size).all()) and int(counts_G[-1]) <= size:
        return InputOrder(inputs_E, len(groups_I)), found_G, size
    part = min(part_sizes(size), key=lambda part: int(-(-counts_G // part).sum()) * part_bits(part, bits))
    filled = [
        F.pad(of_group, (0, -len(of_group) % part), value=_NO_INPUT) for of_group in inputs_E.split(counts_G.tolist())
    ]
    return InputOrder(torch.cat(filled), len(groups_I)), found_G.repeat_interleave(-(-counts_G // part)), part
