"""All that k8s/ can be rendered to."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from helpers.manifests import (
    BASE,
    COMPONENTS,
    OVERLAYS,
    Object,
    overlay,
    with_components,
)


@pytest.fixture(scope="session")
def every(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sequence[Object]]:
    """The base, all overlays, and the base with each component."""
    found: dict[str, Sequence[Object]] = {name: overlay(name) for name in (BASE, *OVERLAYS)}
    for name in COMPONENTS:
        found[f"base and {name}"] = with_components([name], tmp_path_factory.mktemp(name))
    return found
