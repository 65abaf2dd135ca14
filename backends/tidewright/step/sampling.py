"""The sampling parameters of a step's rows as columns, where the device finds them."""

# ruff: noqa: N815 - fields, too, carry their shape

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Generic, TypeVar

import numpy as np
import torch

from tidewright.engine.plan import Draw
from tidewright.schema import SamplingParams
from tidewright.step.arena import Arena

Array = TypeVar("Array", np.ndarray, torch.Tensor)

GREEDY_BELOW = 1e-5
"""Temperature: dividing by less leaves nothing but the maximum."""
_FLOAT, _DOUBLE, _INT = np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.int64)
# In the precision that the sampler computes with. All but the position are named as in SamplingParams.
_TYPES: dict[str, np.dtype] = {
    "temperature": _FLOAT,
    "top_k": _INT,
    "top_p": _DOUBLE,
    "min_p": _FLOAT,
    "repetition_penalty": _DOUBLE,
    "presence_penalty": _DOUBLE,
    "frequency_penalty": _DOUBLE,
    "seed": _INT,
    "position": _INT,
}
_OF_PARAMS = tuple(name for name in _TYPES if name != "position")


@dataclass(frozen=True, eq=False)
class Columns(Generic[Array]):
    """One row for each token that is drawn."""

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    repetition_penalty: Array
    presence_penalty: Array
    frequency_penalty: Array
    seed: Array
    position: Array  # of the token that is drawn

    def __getitem__(self, rows: slice | list[int]) -> Columns[Array]:
        return Columns(**{name: getattr(self, name)[rows] for name in _TYPES})

    @property
    def is_random(self) -> Array:
        """By row; the others get their most likely token."""
        return self.temperature >= GREEDY_BELOW

    @property
    def is_filtered(self) -> Array:
        """By row: min_p, top_k or top_p may drop tokens."""
        return (self.top_k > 0) | (self.top_p < 1.0) | (self.min_p > 0.0)

    @property
    def is_penalised(self) -> Array:
        """By row: what `SamplingParams.has_penalties` says."""
        return (self.repetition_penalty != 1.0) | (self.presence_penalty != 0.0) | (self.frequency_penalty != 0.0)


@dataclass(frozen=True, eq=False)
class SamplingBatch:
    """`draws` has what no column can hold: grammars, bans, biases."""

    draws: Sequence[Draw]
    all_host: Columns[np.ndarray]  # with more rows than there are draws
    all_device: Columns[torch.Tensor]
    is_plain: bool  # no row needs more than temperature, top_k, top_p, min_p, seed and position
    errors: dict[int, str]  # by row: its parameters are none; the row's numbers mean nothing
    host_places_R: np.ndarray  # of the rows' sequences
    places_R: torch.Tensor  # int64; likewise, but the number of places if another row of the sequence follows

    @cached_property
    def host(self) -> Columns[np.ndarray]:
        """The same numbers as `device`."""
        return self.all_host[: len(self.draws)]

    @cached_property
    def device(self) -> Columns[torch.Tensor]:
        return self.all_device[: len(self.draws)]

    @classmethod
    def of(cls, draws: Sequence[Draw], device: torch.device | None = None) -> SamplingBatch:
        """Made from scratch, for runners without persistent buffers."""
        device = device or torch.device("cpu")
        arena = Arena(sampling_arrays(len(draws)), device, staged=device.type != "cpu")
        batch = SamplingColumns(len(draws), arena).gather(draws, np.arange(len(draws)))
        arena.upload()
        return batch


def sampling_arrays(rows: int) -> Mapping[str, tuple[np.dtype, int]]:
    """What SamplingColumns needs in the arena for up to `rows` draws in a step."""
    return {f"sampling.{name}": (dtype, rows) for name, dtype in (*_TYPES.items(), ("place", _INT))}


def unusable(error: Exception) -> str:
    """What a request is told whose parameters raise it."""
    cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return f"no token can be drawn with these sampling parameters ({cause})"


def _any_banned(draws: Sequence[Draw]) -> bool:
    return any(draw.banned_ids or draw.bad_words_ids for draw in draws)


class SamplingColumns:
    """Keeps the parameters of running sequences, by place, and copies those of a step's rows into the arena.

    A place's parameters are read when its sequence first draws; while the same sequences draw, only positions change.
    """

    def __init__(self, places: int, arena: Arena) -> None:
        self._of_place: dict[str, np.ndarray] = {name: np.zeros(places, _TYPES[name]) for name in _OF_PARAMS}
        self._is_plain = np.zeros(places, bool)
        self._params: list[SamplingParams | None] = [None] * places
        self._errors: dict[int, str] = {}  # by place
        self._gathered: np.ndarray = np.empty(0, np.int64)  # the places whose columns are in the arena
        self._is_plain_step = True  # all of these
        self._host = Columns(**{name: arena.host[f"sampling.{name}"] for name in _TYPES})
        self._host_place, self._device_place = arena.host["sampling.place"], arena.device["sampling.place"]
        self._device = Columns(**{name: arena.device[f"sampling.{name}"] for name in _TYPES})

    def gather(self, draws: Sequence[Draw], places_R: np.ndarray) -> SamplingBatch:
        """`places_R`: of the draws' sequences. The caller uploads the arena."""
        is_new = places_R is not self._gathered and not np.array_equal(places_R, self._gathered)
        for draw, place in zip(draws, places_R.tolist(), strict=True):
            if self._params[place] is not draw.params:
                self._read(place, draw.params)
                is_new = True
        if is_new:
            self._gathered = places_R
            for name, column in self._of_place.items():
                np.take(column, places_R, out=getattr(self._host, name)[: len(draws)], mode="clip")
            to_keep_R = self._host_place[: len(draws)]
            to_keep_R[:] = places_R
            to_keep_R[:-1][places_R[1:] == places_R[:-1]] = len(self._params)
            self._is_plain_step = bool(self._is_plain[places_R].all())
        self._host.position[: len(draws)] = [draw.position for draw in draws]
        is_plain = self._is_plain_step and not _any_banned(draws)
        errors: dict[int, str] = {}
        if self._errors:
            errors = {row: self._errors[place] for row, place in enumerate(places_R.tolist()) if place in self._errors}
        return SamplingBatch(
            draws=draws,
            all_host=self._host,
            all_device=self._device,
            is_plain=is_plain and not errors,
            errors=errors,
            host_places_R=places_R,
            places_R=self._device_place[: len(draws)],
        )

    def advance(self, last: SamplingBatch, draws: Sequence[Draw]) -> SamplingBatch:
        """Likewise, where the step before has drawn the token before for each of the same sequences, as `last` says."""
        self._host.position[: len(draws)] += 1
        is_plain = last.is_plain or (self._is_plain_step and not last.errors and not _any_banned(draws))
        return replace(last, draws=draws, is_plain=is_plain)

    def _read(self, place: int, params: SamplingParams) -> None:
        self._params[place] = params
        self._errors.pop(place, None)
        try:
            self._write(place, params)
        except Exception as error:  # validation let a number through that no column holds: it is this request's alone
            self._write(place, SamplingParams())
            self._errors[place] = unusable(error)

    def _write(self, place: int, params: SamplingParams) -> None:
        for name, column in self._of_place.items():
            column[place] = getattr(params, name) or 0  # a seed may be None
        self._is_plain[place] = (
            not params.has_penalties
            and not params.guided
            and not params.logit_bias
            and params.allowed_token_ids is None
            and params.logprobs is None
        )
