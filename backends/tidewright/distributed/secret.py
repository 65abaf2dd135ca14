"""The secret that the ranks of several hosts share: read from its file, and where it may be left out. No torch."""

from __future__ import annotations

from pathlib import Path

from tidewright.address import is_loopback

SHORTEST, LONGEST = 16, 4096  # bytes


class SecretFileError(ValueError):
    """There is no usable secret where one is needed; the message says what to change."""


def rendezvous_secret(file: str, host: str) -> bytes | None:
    """The secret in `file`. None if there is no file, and ranks come to `host` from this machine only.

    Raises SecretFileError.
    """
    if file:
        return read_secret(file)
    if not is_loopback(host):
        raise SecretFileError(
            f"the rendezvous {host} can be reached from other hosts, so ranks must prove that they belong here: "
            "give each host the same --rendezvous-secret-file, made with `openssl rand -hex 32`"
        )
    return None


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
