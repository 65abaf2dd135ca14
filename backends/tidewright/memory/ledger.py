"""What each model may have of the memory that the models of a server share: written by `serve`, read by the models.

One that is loaded anew starts with what the others have left for it, not with the share that it had at first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

LEDGER_VARIABLE = "TIDEWRIGHT_MEMORY_LEDGER"
"""Of the environment: the file."""


def write(file: Path, limits: Mapping[str, int]) -> None:
    """`limits`: bytes of KV cache on each rank, by the name of the decoder in Triton."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps(limits), encoding="utf-8")
    new.rename(file)


def limit_of(decoder: str) -> int:
    """0: its configured share, for nothing has been moved yet."""
    file = os.environ.get(LEDGER_VARIABLE)
    if not file or not Path(file).exists():
        return 0
    return int(json.loads(Path(file).read_text(encoding="utf-8")).get(decoder, 0))
