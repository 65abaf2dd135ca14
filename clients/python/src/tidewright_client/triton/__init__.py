"""Triton itself over gRPC (KServe v2), without a gateway. It needs the extra `triton`."""

from __future__ import annotations

from tidewright_client import extras

try:
    import grpc  # noqa: F401
    import tritonclient.grpc  # noqa: F401
except (ImportError, RuntimeError):  # the latter is tritonclient's, without its own extra
    raise extras.missing("TritonClient and AsyncTritonClient", "tritonclient[grpc]", "triton") from None

from tidewright_client.triton.async_client import AsyncTritonClient, AsyncTritonStream
from tidewright_client.triton.pieces import Embedding, Health, Logprob, Output, Piece, Status, TritonAnswer
from tidewright_client.triton.sync_client import TritonClient, TritonStream

__all__ = [
    "AsyncTritonClient",
    "AsyncTritonStream",
    "Embedding",
    "Health",
    "Logprob",
    "Output",
    "Piece",
    "Status",
    "TritonAnswer",
    "TritonClient",
    "TritonStream",
]
