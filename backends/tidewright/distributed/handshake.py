"""What comes before the first message between a rank and rank 0: both prove that they know the rendezvous secret.

Four frames of known length, of which nothing is decoded:

    rank    MAGIC, whether it has a secret, a nonce
    rank 0  a verdict, a nonce                        (without a secret at both ends, this is all)
    rank    HMAC(secret, "rank", both nonces)
    rank 0  a verdict, HMAC(secret, "rank 0", both nonces)

The rank proves first, so that rank 0 gives strangers nothing to test guesses on. Nonces are new for each connection: a
recorded proof is of no use on another. What is said afterwards is neither encrypted nor authenticated.

Frames are those of `multiprocessing.connection.Connection`, to which the socket is handed over.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
import time

MAGIC = b"tidewright ranks 1\n"
NONCE, PROOF = 32, 32  # bytes
GREETING = len(MAGIC) + 1 + NONCE
LONGEST_GREETING = 256  # bytes; of another version, which is told so

_LENGTH = struct.Struct("!i")
_GO_ON, _WRONG, _NEEDED, _UNKNOWN = b"\0", b"\1", b"\2", b"\3"
_REASONS = {
    _WRONG: "its rendezvous secret is not rank 0's; give both the same --rendezvous-secret-file",
    _NEEDED: "rank 0 asks for a rendezvous secret, and this rank has none; "
    "give it rank 0's by --rendezvous-secret-file",
    _UNKNOWN: "this rank has a rendezvous secret, and rank 0 has none; give rank 0 the same --rendezvous-secret-file, "
    "or none to both",
}


class HandshakeError(Exception):
    """The other end is not one of ours, or broke off."""


class SecretMismatchError(HandshakeError):
    """The two don't have the same secret; the message says what to change."""


class ForeignPeerError(HandshakeError):
    """It does not begin as this version does."""


class Frames:
    """Messages over a socket, all of which must come before `deadline` (`time.monotonic()`)."""

    def __init__(self, connected: socket.socket, deadline: float) -> None:
        self._socket, self._deadline = connected, deadline

    def send(self, message: bytes) -> None:
        """Raises OSError, TimeoutError among them."""
        self._patience()
        self._socket.sendall(_LENGTH.pack(len(message)) + message)

    def receive(self, longest: int) -> bytes:
        """Raises EOFError (nothing came), HandshakeError, OSError."""
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size, is_first=True))
        if not 0 <= length <= longest:
            raise ForeignPeerError(f"a message of {length} bytes, where at most {longest} are expected")
        return self._exactly(length)

    def _exactly(self, size: int, is_first: bool = False) -> bytes:
        received = b""
        while len(received) < size:
            self._patience()
            if not (part := self._socket.recv(size - len(received))):
                if is_first and not received:
                    raise EOFError
                raise HandshakeError("it hung up in the middle of a message")
            received += part
        return received

    def _patience(self) -> None:
        if (left := self._deadline - time.monotonic()) <= 0:
            raise TimeoutError("timed out")
        self._socket.settimeout(left)


def admit(frames: Frames, secret: bytes | None) -> None:
    """Rank 0's side.

    Raises:
        EOFError: it hung up before it said anything, as a worker does that looks whether rank 0 is there.
        SecretMismatchError: it was told why, in a frame.
        HandshakeError, OSError: it is none of ours, or is gone.
    """
    greeting = frames.receive(LONGEST_GREETING)
    if len(greeting) != GREETING or not greeting.startswith(MAGIC):
        raise ForeignPeerError("it does not begin as a rank of this version does; install the same on all hosts")
    theirs = greeting[-NONCE:]
    has_secret = greeting[len(MAGIC) : -NONCE] != b"\0"
    own = secrets.token_bytes(NONCE)
    verdict = _GO_ON
    if has_secret != (secret is not None):
        verdict = _UNKNOWN if has_secret else _NEEDED
    frames.send(verdict + own)
    if verdict != _GO_ON:
        raise SecretMismatchError(_REASONS[verdict])
    if secret is None:
        return
    proof = _receive_or_fail(frames, PROOF)
    if not hmac.compare_digest(proof, _proof(secret, b"rank", theirs, own)):
        frames.send(_WRONG + bytes(PROOF))
        raise SecretMismatchError(_REASONS[_WRONG])
    frames.send(_GO_ON + _proof(secret, b"rank 0", theirs, own))


def introduce(frames: Frames, secret: bytes | None) -> None:
    """The rank's side; raises as `admit` does."""
    own = secrets.token_bytes(NONCE)
    frames.send(MAGIC + (b"\0" if secret is None else b"\1") + own)
    answer = _receive_or_fail(frames, 1 + NONCE)
    verdict, theirs = answer[:1], answer[1:]
    if reason := _REASONS.get(verdict):
        raise SecretMismatchError(reason)
    if len(theirs) != NONCE or verdict != _GO_ON:
        raise ForeignPeerError("rank 0 does not answer as this version does; install the same on all hosts")
    if secret is None:
        return
    frames.send(_proof(secret, b"rank", own, theirs))
    answer = _receive_or_fail(frames, 1 + PROOF)
    verdict, proof = answer[:1], answer[1:]
    if reason := _REASONS.get(verdict):
        raise SecretMismatchError(reason)
    if verdict != _GO_ON or not hmac.compare_digest(proof, _proof(secret, b"rank 0", own, theirs)):
        raise SecretMismatchError(
            "what listens there does not know the rendezvous secret; is --rendezvous the address of rank 0?"
        )


def _proof(secret: bytes, side: bytes, rank_nonce: bytes, rank_0_nonce: bytes) -> bytes:
    return hmac.digest(secret, MAGIC + side + b"\0" + rank_nonce + rank_0_nonce, "sha256")


def _receive_or_fail(frames: Frames, longest: int) -> bytes:
    try:
        return frames.receive(longest)
    except EOFError:
        raise HandshakeError("it hung up") from None
