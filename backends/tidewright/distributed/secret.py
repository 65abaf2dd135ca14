"""The secret that the ranks of several hosts share: read from its file. No torch."""

from __future__ import annotations

from pathlib import Path

SHORTEST, LONGEST = 16, 4096  # bytes


class SecretFileError(ValueError):
    """The file holds no usable secret; the message names the file and says what to change."""


def read_secret(file: str | Path) -> bytes:
    """Raises SecretFileError."""
    path = Path(file)
    try:
        with path.open("rb") as opened:
            secret = opened.read(LONGEST + 1)
    except OSError as error:
        raise SecretFileError(f"can't read the rendezvous secret {path}: {error.strerror}") from None
    if len(secret) > LONGEST:
        raise SecretFileError(f"the rendezvous secret {path} is longer than {LONGEST} bytes")
    secret = secret.strip()  # an editor, or `echo`, ends a file with a newline
    if len(secret) < SHORTEST:
        raise SecretFileError(
            f"the rendezvous secret {path} has {len(secret)} bytes; at least {SHORTEST} are needed: "
            "make one with `openssl rand -hex 32`"
        )
    return secret
