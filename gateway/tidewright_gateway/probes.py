"""Paths that machines ask again and again: health checks and scrapes. They are no work of a caller's."""

from __future__ import annotations

_PATHS = frozenset(("/health", "/health/live", "/health/ready", "/metrics"))


def is_probe(path: str) -> bool:
    return path in _PATHS
