"""What rank 0 and the other tensor-parallel ranks say to each other: msgpack structs over one TCP connection each.

A rank says `Hello` and is told `Join` or `Refused`. Then rank 0 sends `Step`, `Inputs`, `Ping` and `Reserve`; a rank
answers the last two with `Pong`, and says `Failed` before it gives up.
"""

from __future__ import annotations

import os
import socket
import zlib
from array import array
from multiprocessing.connection import Connection

import msgspec

from tidewright.engine.messages import Abort, EngineConfig, Submit
from tidewright.engine.pace import StepPace
from tidewright.engine.plan import SequenceResult, StepPlan


class Hello(msgspec.Struct, frozen=True, tag="hello", array_like=True):
    rank: int
    version: str  # of Tidewright
    model: str  # fingerprint: all ranks must have the same model


class Refused(msgspec.Struct, frozen=True, tag="refused", array_like=True):
    """The rank can't be of this group; `message` says what to change."""

    message: str


class Join(msgspec.Struct, frozen=True, tag="join", array_like=True):
    config: EngineConfig  # rank 0's; the rank replaces its model_dir by its own
    store_port: int  # of torch.distributed's store, on the host of the rendezvous


class Expire(msgspec.Struct, frozen=True, tag="expire", array_like=True):
    """The deadline of a request has passed."""

    request_id: int


class Committed(msgspec.Struct, frozen=True, tag="committed", array_like=True):
    """The oldest step in flight is done."""

    results: tuple[SequenceResult, ...]  # the drawn tokens, without log-probabilities


class Resize(msgspec.Struct, frozen=True, tag="resize", array_like=True):
    """The KV cache has another number of blocks, as Scheduler.resize says; for more, there is memory (`Reserve`)."""

    num_blocks: int


class AddAdapter(msgspec.Struct, frozen=True, tag="add_adapter", array_like=True):
    """Requests may have the LoRA adapter that was read as `number`."""

    name: str
    number: int
    digest: str


class DropAdapter(msgspec.Struct, frozen=True, tag="drop_adapter", array_like=True):
    """No request has the LoRA adapter, and none may."""

    name: str


Input = Submit | Abort | Expire | Committed | Resize | AddAdapter | DropAdapter


class Step(msgspec.Struct, frozen=True, tag="step", array_like=True):
    """Compute the next step: all that its plan depends on, in order, and what the plan must come out as."""

    inputs: list[Input]
    pace: StepPace
    checksum: int


class Inputs(msgspec.Struct, frozen=True, tag="inputs", array_like=True):
    """As those of a step, when there is none to come, or a `Reserve` before it: what they do must not wait for one."""

    inputs: list[Input]


class Ping(msgspec.Struct, frozen=True, tag="ping", array_like=True):
    number: int


class Reserve(msgspec.Struct, frozen=True, tag="reserve", array_like=True):
    """Get memory for so many blocks of KV cache, or give back what is beyond them. Plans know nothing of it yet."""

    number: int
    num_blocks: int


class Pong(msgspec.Struct, frozen=True, tag="pong", array_like=True):
    number: int
    lack: str = ""  # what the device says if memory does not suffice; then all is as before


class ReadAdapter(msgspec.Struct, frozen=True, tag="read_adapter", array_like=True):
    """Read this LoRA adapter, beside the steps, and say what came of it: `AdapterRead`."""

    number: int
    path: str


class ForgetAdapter(msgspec.Struct, frozen=True, tag="forget_adapter", array_like=True):
    """What was read will not be used."""

    number: int


class AdapterRead(msgspec.Struct, frozen=True, tag="adapter_read", array_like=True):
    number: int
    digest: str = ""
    rank: int = 0  # of its matrices
    bytes: int = 0  # of this rank's part
    error: str = ""  # why it can't be loaded


class Failed(msgspec.Struct, frozen=True, tag="failed", array_like=True):
    message: str
    step_tokens: int = 0  # as in what the engine says to the bridge


FromLeader = Join | Refused | Step | Inputs | Ping | Reserve | ReadAdapter | ForgetAdapter
FromRank = Hello | Pong | AdapterRead | Failed

decode_from_leader = msgspec.msgpack.Decoder(FromLeader).decode
decode_from_rank = msgspec.msgpack.Decoder(FromRank).decode


def end_when_silent(connection: Connection, seconds: float) -> None:
    """Lets it fail when the other host's kernel answers nothing for so long, and up to a second more.

    A host that lost its power, or whose cable was cut, says no goodbye.
    """
    with socket.socket(fileno=os.dup(connection.fileno())) as connected:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * seconds))


def lost_patience(config: EngineConfig) -> float:
    """Seconds of silence after which a host is lost: before a collective fails, which could not say of whom.

    The kernel looks once a second, so that with a `heartbeat_timeout` under 6 s the collective may fail first.
    """
    return config.heartbeat_timeout / 3


def plan_checksum(plan: StepPlan) -> int:
    """Of all that decides what a step computes: tokens, positions, adapters, and the blocks new in the tables."""
    value = zlib.crc32(array("q", (*plan.ended, *plan.preempted, *(slot for slot, _ in plan.adapters))).tobytes())
    for planned in plan.sequences:
        head = (planned.request_id, planned.start, len(planned.draws), planned.embeds, planned.count, planned.adapter)
        content = (*head, *planned.token_ids, planned.first_block, *planned.new_blocks)
        value = zlib.crc32(array("q", content).tobytes(), value)
    return value
