"""Triton itself over gRPC (KServe v2), without a gateway: `pip install tidewright-client[triton]`."""

from __future__ import annotations

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
