"""How a stub tells `tidewright serve` in one line why a model can't start: Triton's log buries it in a traceback."""

from __future__ import annotations

import os
from pathlib import Path

ERROR_FILE_VARIABLE = "TIDEWRIGHT_ERROR_FILE"


def report_start_error(error: Exception, model: str = "") -> None:
    """Write the message to the file that the launcher named, if one did. `model`: whose it is, of several."""
    if file := os.environ.get(ERROR_FILE_VARIABLE):
        Path(file).write_text(f"{f'{model}: ' if model else ''}{error or type(error).__name__}\n", encoding="utf-8")
