"""The stub process must stay light: what Triton's models import brings in neither torch nor transformers."""

from __future__ import annotations

import subprocess
import sys


def test_the_bridge_imports_no_torch() -> None:
    script = (
        "import sys, tidewright.bridge.bridge, tidewright.bridge.metrics, tidewright.bridge.request\n"
        "print(*sorted({'torch', 'transformers', 'safetensors'} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert run.stdout.split() == []
