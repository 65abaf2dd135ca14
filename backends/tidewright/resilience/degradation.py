"""Degradation ladder: the more load, the less is promised to each request, so that most still get an answer.

Up at once, and over several levels if need be; down one level at a time, each after a time of calm.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from enum import Enum, IntEnum


class Level(IntEnum):
    ALL_FEATURES = 0
    SHORT_ANSWERS = 1
    FALLBACK_ONLY = 2
    SHED = 3


@dataclass(frozen=True)
class Load:
    kv_cache: float  # share of its blocks in use
    queue: float  # waiting requests, as a share of what may wait
    wait: float  # seconds that requests wait for their first step
    breaker_open: bool


@dataclass(frozen=True)
class Thresholds:
    """The value of one signal from which each level begins."""

    short: float
    fallback: float
    shed: float

    def level(self, value: float) -> Level:
        if value >= self.shed:
            return Level.SHED
        if value >= self.fallback:
            return Level.FALLBACK_ONLY
        return Level.SHORT_ANSWERS if value >= self.short else Level.ALL_FEATURES


@dataclass(frozen=True)
class LadderConfig:
    kv_cache: Thresholds
    queue: Thresholds
    wait: Thresholds
    release: float
    dwell: float


@dataclass(frozen=True)
class Degradation:
    level: Level
    load_level: Level  # without the breaker
    reasons: tuple[str, ...]  # signals that lead to the level or hold it; "dwell": none does any more


class Route(Enum):
    DECODER = "decoder"
    FALLBACK = "fallback"
    REFUSE = "refuse"


@dataclass(frozen=True)
class Treatment:
    route: Route
    max_tokens: int


class Ladder:
    """Thread-safe by a lock inside. A clock that is set back starts the time of calm anew.

    The breaker has its own hysteresis, so it adds FALLBACK_ONLY while it is open and nothing after.
    """

    def __init__(self, config: LadderConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._level = Level.ALL_FEATURES
        self._calm_since: float | None = None

    def update(self, load: Load, now: float) -> Degradation:
        with self._lock:
            reached, held = self._levels(load, 1.0), self._levels(load, self._config.release)
            self._move(max(reached.values()), max(held.values()), now)
            load_level = self._level
        reasons = [signal for signal, level in held.items() if level >= load_level > Level.ALL_FEATURES]
        if load_level and not reasons:
            reasons = ["dwell"]
        if not load.breaker_open:
            return Degradation(load_level, load_level, tuple(reasons))
        return Degradation(max(load_level, Level.FALLBACK_ONLY), load_level, (*reasons, "breaker"))

    def _levels(self, load: Load, scale: float) -> dict[str, Level]:
        """Level of each signal by thresholds that are `scale` times as high."""
        return {
            "kv_cache": self._config.kv_cache.level(load.kv_cache / scale),
            "queue": self._config.queue.level(load.queue / scale),
            "wait": self._config.wait.level(load.wait / scale),
        }

    def _move(self, reached: Level, held: Level, now: float) -> None:
        if reached > self._level:
            self._level, self._calm_since = reached, None
        elif held >= self._level:
            self._calm_since = None
        else:
            self._calm_since = now if self._calm_since is None else min(self._calm_since, now)
            if now - self._calm_since >= self._config.dwell:
                self._level, self._calm_since = Level(self._level - 1), now


def treatment(degradation: Degradation, max_tokens: int, short_answer: int) -> Treatment:
    """What a request that asks for `max_tokens` gets; whoever lowers them lowers `min_tokens` as well.

    An open breaker alone still routes to the decoder: the breaker refuses by itself, and without a call it could never
    probe. Each level includes those before it.
    """
    if degradation.level >= Level.SHORT_ANSWERS:
        max_tokens = min(max_tokens, short_answer)
    if degradation.load_level is Level.SHED:
        return Treatment(Route.REFUSE, 0)
    route = Route.FALLBACK if degradation.load_level is Level.FALLBACK_ONLY else Route.DECODER
    return Treatment(route, max_tokens)
