"""What is noted of each request, and the file that it goes through, one JSON array a line.

The file is written by locust's process and read by the one that reports, so an interrupted run still has its report.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO

import msgspec

MAX_ERROR = 160  # characters of an error's text
SILENT = "no byte for "
UNENDED = "still running a minute after the end of the test"
"""The errors of streams without an end begin with one of these."""
NO_CONNECTION = "connection: none came in time"


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """One request. Times are seconds from its start, but for `at`."""

    at: float
    """Its start, in seconds since the epoch."""
    protocol: str
    kind: str
    tenant: str
    prompt_tokens: int
    """As the server counted; 0 if it did not say."""
    output_tokens: int
    first: float
    """Its first token (TTFT)."""
    last: float
    """Its last token: end to end."""
    longest_gap: float
    """Between two arrivals of tokens."""
    error: str = ""
    """Empty if it ended as it should, or because the client wanted so."""
    cancelled: bool = False

    @property
    def served(self) -> bool:
        return not self.error and not self.cancelled

    @property
    def per_token(self) -> float:
        """Mean time of a token after the first (TPOT); 0 if there is none."""
        return (self.last - self.first) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Sample)


def write(file: IO[bytes], samples: list[Sample]) -> None:
    file.writelines(_encoder.encode(sample) + b"\n" for sample in samples)
    file.flush()


def read(path: Path) -> list[Sample]:
    with path.open("rb") as file:
        return list(read_from(file))


def read_from(file: IO[bytes]) -> Iterator[Sample]:
    """What is new in the file; a line that is not whole yet waits for the next call."""
    while line := file.readline():
        if not line.endswith(b"\n"):
            file.seek(-len(line), 1)
            return
        yield _decoder.decode(line)
