"""engine/torch_import.py: what an operator has set stays. That the library takes it: tests/kernels/test_build.py."""

from __future__ import annotations

import os

import pytest

from tidewright.engine.torch_import import SPINS, importing_torch


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
    ids=["nothing", "a number", "a policy"],
)
def test_how_long_threads_spin(monkeypatch: pytest.MonkeyPatch, given: dict[str, str], spins: str | None) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "TORCH_DEVICE_BACKEND_AUTOLOAD"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with importing_torch():
        pass
    assert os.environ.get("GOMP_SPINCOUNT") == spins
