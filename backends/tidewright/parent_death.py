"""Asks the kernel for a signal when the parent goes, so that no child outlives whoever started it."""

from __future__ import annotations

import ctypes

_PR_SET_PDEATHSIG = 1
_PRCTL = ctypes.CDLL(None).prctl  # looked up here: between fork and exec, no lock of the loader may be taken


def signal_on_parent_death(number: int) -> None:
    """Send this process signal `number` when the thread that started it ends (prctl(2), PR_SET_PDEATHSIG)."""
    _PRCTL(_PR_SET_PDEATHSIG, number)
