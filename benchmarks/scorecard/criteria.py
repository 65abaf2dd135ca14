"""What the project promises, by which figures that is judged, and what was measured last: two YAML files, validated."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

HERE = Path(__file__).parent
CRITERIA, SCORES = HERE / "criteria.yaml", HERE / "scores.yaml"

_REDUCED: dict[str, Callable[[Sequence[float]], float]] = {
    "first": lambda found: found[0],
    "last": lambda found: found[-1],
    "max": max,
    "min": min,
    "median": statistics.median,
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Benchmark(_Strict):
    command: str
    minutes: float = Field(gt=0)
    needs: str = ""
    """What must be there before, in words."""


class Figure(_Strict):
    what: str
    unit: str = ""
    least: float | None = None
    most: float | None = None
    benchmark: str
    find: str = ""
    """A regular expression with one group, the number, in the benchmark's output. Empty: it is read off by a person."""
    of_several: Literal["first", "last", "max", "min", "median"] = "first"

    @field_validator("find")
    @classmethod
    def _has_one_group(cls, text: str) -> str:
        if text and re.compile(text).groups != 1:
            raise ValueError("needs one group: the number")
        return text

    def read(self, output: str) -> float | None:
        """None: the output does not have it."""
        found = [float(one.replace(",", "")) for one in re.findall(self.find, output)] if self.find else []
        return _REDUCED[self.of_several](found) if found else None

    def is_met(self, value: float) -> bool | None:
        """None: it has no target."""
        if self.least is None and self.most is None:
            return None
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)


class Criterion(_Strict):
    promise: str
    figures: dict[str, Figure] = {}
    tests: list[str] = []
    """Of what is a yes or a no: files, from the root of the repository."""
    not_here: str = ""
    """What of it can't be measured on a machine without GPUs or a cluster, and why."""
    not_built: str = ""


class Criteria(_Strict):
    benchmarks: dict[str, Benchmark]
    criteria: dict[str, Criterion]

    @model_validator(mode="after")
    def _names_are_known(self) -> Criteria:
        keys = [key for one in self.criteria.values() for key in one.figures]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise ValueError(f"figures with one name: {sorted(twice)}")
        unknown = {one.benchmark for one in self.figures.values()} - self.benchmarks.keys()
        if unknown:
            raise ValueError(f"no such benchmark: {sorted(unknown)}")
        for name, one in self.criteria.items():
            if not (one.figures or one.tests or one.not_here or one.not_built):
                raise ValueError(f"{name} says nothing of how it is judged")
        return self

    @property
    def figures(self) -> dict[str, Figure]:
        return {key: figure for one in self.criteria.values() for key, figure in one.figures.items()}


class Score(_Strict):
    value: float
    day: date
    machine: str
    note: str = ""


def load_criteria(path: Path = CRITERIA) -> Criteria:
    """Raises pydantic.ValidationError."""
    return Criteria.model_validate(yaml.safe_load(path.read_text()))


def load_scores(path: Path = SCORES) -> dict[str, Score]:
    """Raises pydantic.ValidationError."""
    return {key: Score.model_validate(one) for key, one in yaml.safe_load(path.read_text()).items()}


def save_scores(scores: dict[str, Score], path: Path = SCORES) -> None:
    plain = {key: scores[key].model_dump(exclude_defaults=True) for key in sorted(scores)}
    path.write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120))
