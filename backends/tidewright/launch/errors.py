"""The errors that a user of the command line can cause or cure. Each message says what to change."""

from __future__ import annotations


class LaunchError(Exception):
    """Base of this package's errors: the command prints the message alone and exits with 1."""


class PrepareError(LaunchError):
    """A model can't be made ready."""


class UnsupportedModelError(PrepareError):
    """The source is readable, but of a kind that isn't served."""


class ExportError(LaunchError):
    """A model can't be exported to ONNX."""


class TritonNotFoundError(LaunchError):
    """No usable tritonserver on this machine."""
