"""Which trace a request belongs to, and what its replica is told of it."""

from __future__ import annotations

import asyncio
import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.echo_replica import EchoReplica
from tidewright.schema import SamplingParams
from tidewright_gateway.replicas.triton import CallRequest, TritonClient
from tidewright_gateway.tracing.context import Tracer

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GIVEN = f"00-{TRACE}-{PARENT}-01".encode()


@pytest.mark.parametrize("ratio", [0.0, 1.0])
@pytest.mark.parametrize(("flags", "sampled"), [("01", True), ("03", True), ("00", False), ("02", False)])
def test_a_request_stays_in_its_trace_and_its_decision_stands(ratio: float, flags: str, sampled: bool) -> None:
    context = Tracer(ratio, True).begin([(b"traceparent", GIVEN[:-2] + flags.encode()), (b"tracestate", b"a=1, b=2")])
    assert (context.trace_id, context.sampled) == (TRACE, sampled)
    assert context.span_id != PARENT
    assert context.traceparent == f"00-{TRACE}-{context.span_id}-0{int(sampled)}"
    told = (("traceparent", context.traceparent), ("tracestate", "a=1, b=2"))
    assert context.metadata == (told if sampled else ())


@pytest.mark.parametrize("ratio", [0.0, 1.0])
@pytest.mark.parametrize("flags", ["01", "00"])
def test_no_stranger_decides_what_is_traced(ratio: float, flags: str) -> None:
    context = Tracer(ratio).begin([(b"traceparent", GIVEN[:-2] + flags.encode())])
    assert (context.trace_id, context.sampled) == (TRACE, bool(ratio))


def test_one_of_a_later_version_is_read_as_far_as_it_is_known() -> None:
    context = Tracer(0, True).begin([(b"traceparent", b"cc" + GIVEN[2:] + b"-more")])
    assert (context.trace_id, context.sampled, context.traceparent[:3]) == (TRACE, True, "00-")


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"ff" + GIVEN[2:],
        GIVEN + b"-more",
        GIVEN.upper(),
        GIVEN[:-1],
        GIVEN + b" ",
        GIVEN.replace(TRACE.encode(), b"0" * 32),
        GIVEN.replace(PARENT.encode(), b"0" * 16),
        GIVEN.replace(b"-", b"_"),
        "٤".encode() + GIVEN[2:],
    ],
)
def test_one_that_is_not_valid_begins_a_new_trace_without_its_state(value: bytes) -> None:
    context = Tracer(1).begin([(b"traceparent", value), (b"tracestate", b"a=1")])
    assert re.fullmatch("[0-9a-f]{32}", context.trace_id)
    assert (context.trace_id == TRACE, context.sampled, context.tracestate) == (False, True, "")


def test_two_parents_are_none_and_states_are_joined() -> None:
    assert Tracer(0).begin([(b"traceparent", GIVEN)] * 2).trace_id != TRACE
    headers = [(b"tracestate", b"a=1"), (b"traceparent", GIVEN), (b"tracestate", b"b=2")]
    assert Tracer(0).begin(headers).tracestate == "a=1,b=2"


@pytest.mark.parametrize(("length", "kept"), [(1024, 1024), (1025, 0)])
def test_a_state_that_is_too_long_is_dropped(length: int, kept: int) -> None:
    headers = [(b"traceparent", GIVEN), (b"tracestate", b"a" * length)]
    assert len(Tracer(0).begin(headers).tracestate) == kept


def test_so_many_of_the_new_ones_are_sampled() -> None:
    for ratio in (0.0, 0.25, 1.0):
        contexts = [Tracer(ratio).begin([]) for _ in range(2000)]
        assert sum(context.sampled for context in contexts) == pytest.approx(2000 * ratio, abs=120)  # 6 sigma
        assert len({context.trace_id for context in contexts}) == len({context.span_id for context in contexts}) == 2000


@given(st.binary(max_size=60) | st.just(GIVEN), st.binary(max_size=2000) | st.text("a=,;! ~", max_size=2000))
def test_whatever_is_sent_grpc_can_take_what_comes_of_it(parent: bytes, state: bytes | str) -> None:
    value = state if isinstance(state, bytes) else state.encode()
    for _, text in Tracer(1).begin([(b"traceparent", parent), (b"tracestate", value)]).metadata:
        assert re.fullmatch(r"[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?", text)
        assert len(text) <= 1024


def test_the_replica_is_told() -> None:
    async def ask(replica: EchoReplica) -> None:
        client = TritonClient(replica.grpc_url, 1)
        for headers in ([(b"traceparent", GIVEN), (b"tracestate", b"a=1")], []):
            sampling = msgspec.json.encode(SamplingParams(max_tokens=2))
            request = CallRequest("r", [1], sampling, metadata=Tracer(0, trusts_callers=True).begin(headers).metadata)
            call = client.generate("decoder", request)
            assert [(await call.read()).finish_reason for _ in range(2)] == [None, "length"]
            call.close()
        await client.close()

    with EchoReplica() as replica:
        asyncio.run(ask(replica))
        told, untold = replica.metadata
    assert told["traceparent"].startswith(f"00-{TRACE}-")
    assert told["tracestate"] == "a=1"
    assert "traceparent" not in untold
