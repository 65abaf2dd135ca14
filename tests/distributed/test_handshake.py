"""Rank and rank 0 prove to each other that they know the secret; the proofs are computed here independently."""

from __future__ import annotations

import hashlib
import hmac
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tidewright.distributed.handshake import (
    ForeignPeerError,
    Frames,
    HandshakeError,
    SecretMismatchError,
    admit,
    introduce,
)

SECRET = b"sixteen bytes or more"
MAGIC = b"tidewright ranks 1\n"
Side = Callable[[Frames], None]


def outcome(side: Side, other: Side, patience: float = 10.0) -> list[Exception | None]:
    """What the two sides raise when they talk to each other."""
    ends = socket.socketpair()

    def run(role: Side, connected: socket.socket) -> Exception | None:
        try:
            role(Frames(connected, time.monotonic() + patience))
        except Exception as error:
            return error
        else:
            return None
        finally:
            connected.close()

    with ThreadPoolExecutor(2) as pool:
        return [*pool.map(run, [side, other], ends)]


@pytest.mark.parametrize("secret", [SECRET, None])
def test_both_ends_know_it(secret: bytes | None) -> None:
    assert outcome(lambda frames: admit(frames, secret), lambda frames: introduce(frames, secret)) == [None, None]


@pytest.mark.parametrize(
    ("own", "theirs", "reason"),
    [
        (SECRET, SECRET + b"x", "its rendezvous secret is not rank 0's"),
        (SECRET, None, "rank 0 asks for a rendezvous secret"),
        (None, SECRET, "rank 0 has none"),
    ],
)
def test_both_ends_say_the_same_of_secrets_that_differ(own: bytes | None, theirs: bytes | None, reason: str) -> None:
    for error in outcome(lambda frames: admit(frames, own), lambda frames: introduce(frames, theirs)):
        assert isinstance(error, SecretMismatchError)
        assert reason in str(error)


def proof(side: bytes, rank_nonce: bytes, rank_0_nonce: bytes) -> bytes:
    return hmac.new(SECRET, MAGIC + side + b"\0" + rank_nonce + rank_0_nonce, hashlib.sha256).digest()


def test_a_recorded_proof_is_of_no_use_on_another_connection() -> None:
    recorded: list[bytes] = []

    def record(frames: Frames) -> None:
        send = frames.send
        frames.send = lambda message: (recorded.append(message), send(message))[1]  # type: ignore[method-assign]
        introduce(frames, SECRET)

    def replay(frames: Frames) -> None:
        frames.send(recorded[0])
        frames.receive(256)
        frames.send(recorded[1])
        assert frames.receive(256) == b"\1" + bytes(32)

    assert outcome(lambda frames: admit(frames, SECRET), record) == [None, None]
    refused, replayed = outcome(lambda frames: admit(frames, SECRET), replay)
    assert isinstance(refused, SecretMismatchError)
    assert replayed is None


def test_rank_0_must_prove_it_as_well_and_not_with_the_rank_s_own_proof() -> None:
    """An impostor where rank 0 should be: it accepts whatever it gets, and has only that to send back."""

    def reflect(frames: Frames) -> None:
        greeting = frames.receive(256)
        frames.send(b"\0" + greeting[-32:])
        frames.send(b"\0" + frames.receive(256))

    _, error = outcome(reflect, lambda frames: introduce(frames, SECRET))
    assert isinstance(error, SecretMismatchError)
    assert "what listens there does not know the rendezvous secret" in str(error)


def test_a_rank_tells_an_impostor_nothing_before_it_asks_and_its_proof_is_hmac_sha256() -> None:
    def scripted_rank_0(frames: Frames) -> None:
        greeting = frames.receive(256)
        assert greeting[:-32] == MAGIC + b"\1"
        frames.send(b"\0" + b"n" * 32)
        assert frames.receive(256) == proof(b"rank", greeting[-32:], b"n" * 32)
        frames.send(b"\0" + proof(b"rank 0", greeting[-32:], b"n" * 32))

    assert outcome(scripted_rank_0, lambda frames: introduce(frames, SECRET)) == [None, None]


@pytest.mark.parametrize("length", [257, -1, 2**31 - 1])
def test_a_long_message_is_not_read(length: int) -> None:
    def shout(connected: socket.socket) -> None:
        connected.sendall(length.to_bytes(4, "big", signed=True))

    ends = socket.socketpair()
    shout(ends[1])
    with pytest.raises(ForeignPeerError, match="at most 256 are expected"):
        admit(Frames(ends[0], time.monotonic() + 10), SECRET)
    for end in ends:
        end.close()


def test_one_that_says_a_byte_now_and_then_does_not_hold_it_up_for_longer() -> None:
    """The deadline is of all frames, not of each part that comes."""
    ends, stop = socket.socketpair(), threading.Event()

    def drip() -> None:
        for byte in (len(MAGIC) + 33).to_bytes(4, "big") + MAGIC + bytes(33):
            if stop.wait(0.05):
                return
            ends[1].sendall(bytes([byte]))

    dripping = threading.Thread(target=drip)
    dripping.start()
    with pytest.raises(TimeoutError):
        admit(Frames(ends[0], time.monotonic() + 0.3), SECRET)
    stop.set()
    dripping.join()
    for end in ends:
        end.close()


def test_one_that_hangs_up_in_the_middle_is_told_from_one_that_said_nothing() -> None:
    def half(frames: Frames) -> None:
        frames.send(MAGIC + b"\1" + bytes(32))
        frames.receive(256)

    error, _ = outcome(lambda frames: admit(frames, SECRET), half)
    assert type(error) is HandshakeError
    error, _ = outcome(lambda frames: admit(frames, SECRET), lambda frames: None)
    assert isinstance(error, EOFError)


def test_proofs_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest
    monkeypatch.setattr(
        hmac, "compare_digest", lambda one, other: (compared.append((one, other)), compare(one, other))[1]
    )
    assert outcome(lambda frames: admit(frames, SECRET), lambda frames: introduce(frames, SECRET)) == [None, None]
    assert [(len(one), one == other) for one, other in compared] == [(32, True)] * 2
