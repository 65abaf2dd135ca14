"""Where compiled kernels are kept between starts. No triton here: it is to be called before its import."""

from __future__ import annotations

import logging
import os
import tempfile

from tidewright.cache import cache_dir

_VARIABLE = "TRITON_CACHE_DIR"

log = logging.getLogger(__name__)


def keep_kernels() -> None:
    """In Tidewright's cache folder, unless TRITON_CACHE_DIR says where; in a temporary one if that can't be written."""
    if os.environ.get(_VARIABLE):
        return
    folder = cache_dir() / "triton"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        os.environ[_VARIABLE] = str(folder)
    except OSError as error:
        os.environ[_VARIABLE] = tempfile.mkdtemp(prefix="tidewright-triton-")
        log.warning("kernels will be compiled at every start: they can't be kept in %s (%s)", folder, error)
