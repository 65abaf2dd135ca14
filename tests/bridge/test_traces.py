"""What the bridge tells of a request's times, which trace a request is in, and the spans of those without a gateway."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.otlp import OtlpReceiver
from helpers.scripted import Caller, World
from tidewright.bridge.active_request import Origin
from tidewright.bridge.output_sequence import MAX_EVENTS
from tidewright.bridge.request import GenerationRequest, OutputOptions
from tidewright.bridge.sampling_parameters import parse_sampling
from tidewright.bridge.traces import EXPORTED, BridgeTraces, origin_of
from tidewright.engine.messages import SequenceOutput, StepTimes
from tidewright.schema import SamplingParams, Timings
from tidewright.tracing.trace_context import TraceParent

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEADER = f"00-{TRACE}-{SPAN}-01"


def submit(world: World, timings: bool = True, origin: Origin | None = None, **sampling: Any) -> Caller:
    caller = Caller()
    params = SamplingParams(**{"seed": 7, "max_tokens": 50, **sampling})
    request = GenerationRequest([1, 2, 3], "", True, params, OutputOptions(timings=timings))
    world.bridge.submit(request, caller, origin=origin)
    world.settle()
    return caller


def test_the_last_response_tells_when_the_request_got_how_far(world: World) -> None:
    before = time.time()
    caller = submit(world)
    began = time.monotonic() + 1
    world.engine.says(SequenceOutput(1, [5], cached_tokens=16, times=StepTimes(began, 3, began + 2)))
    caller.wait(lambda caller: caller.responses)
    assert caller.responses[0].timings is None
    world.engine.says(SequenceOutput(1, [5], times=StepTimes(preempted=[began + 3])))
    world.engine.says(SequenceOutput(1, [5, 6], "length"))
    caller.end()
    told = caller.responses[-1].timings
    assert isinstance(told, Timings)
    assert before - 1e-3 <= told.arrived <= time.time()
    (one,) = told.sequences
    assert one.sent is not None
    assert one.began is not None
    assert one.ended is not None
    assert 0 <= told.validated <= one.sent <= one.ended <= told.ended
    assert (one.chunks, one.cached_tokens, one.tokens) == (3, 16, 4)
    assert one.first_token == pytest.approx(one.began + 2, abs=1e-5)
    assert one.events == [("preempted", pytest.approx(one.began + 3, abs=1e-5))]


def test_a_replay_is_told_and_the_first_engines_times_stand(world: World) -> None:
    caller = submit(world)
    began = time.monotonic()
    world.engine.says(SequenceOutput(1, [5], times=StepTimes(began, 1, began + 1)))
    world.engine.dies()
    world.engine.comes_up()
    (again,) = world.engine.submitted()
    world.engine.says(SequenceOutput(again.request_id, [6], "length", times=StepTimes(began + 8, 2, began + 9)))
    caller.end()
    (one,) = caller.responses[-1].timings.sequences  # type: ignore[union-attr]
    assert (one.chunks, [what for what, _ in one.events]) == (1, ["replayed"])


def test_what_is_kept_of_a_request_is_bounded(world: World) -> None:
    caller = submit(world)
    for _ in range(3):
        world.engine.says(SequenceOutput(1, [5], times=StepTimes(preempted=[time.monotonic()] * MAX_EVENTS)))
    world.engine.says(SequenceOutput(1, [5], "length"))
    caller.end()
    assert len(caller.responses[-1].timings.sequences[0].events) == MAX_EVENTS  # type: ignore[union-attr]


def test_it_is_told_only_if_asked_for_and_the_engine_knows_the_trace(world: World) -> None:
    caller = submit(world, timings=False, origin=Origin(TraceParent(TRACE, SPAN, False), False))
    assert [message.trace_id for message in world.engine.submitted()] == [TRACE]
    assert next(iter(world.bridge._in_flight.active)).trace_id == TRACE
    world.engine.says(SequenceOutput(1, [5], "length"))
    caller.end()
    assert caller.responses[-1].timings is None


@pytest.mark.parametrize(
    ("sampled", "asks", "exported"), [(True, False, True), (False, False, False), (True, True, False)]
)
def test_the_bridge_exports_what_nobody_else_does(world: World, sampled: bool, asks: bool, exported: bool) -> None:
    with OtlpReceiver() as receiver:
        traces = BridgeTraces(receiver.url)
        world.bridge._in_flight._answers._traces = traces
        caller = submit(world, timings=asks, origin=Origin(TraceParent(TRACE, SPAN, sampled), True))
        world.engine.says(SequenceOutput(1, [5], "length", times=StepTimes(time.monotonic(), 1, time.monotonic())))
        caller.end()
        world.wait_idle()
        traces.stop()
        spans = receiver.traces.of(TRACE)
        names = {"bridge", "engine.queue", "engine.prefill", "engine.decode"} if exported else set()
        assert {span.name for span in spans} == names
        assert {span.parent_id for span in spans if span.name == "bridge"} == ({SPAN} if exported else set())
        assert traces.read_spans() == ({EXPORTED: len(spans)} if exported else {})


def test_tritons_own_span_comes_before_what_the_request_says() -> None:
    tritons = json.dumps({"traceparent": HEADER})
    mine = json.dumps({"temperature": 1, "traceparent": HEADER.replace(SPAN, "1" * 16)})
    assert origin_of(mine, tritons) == Origin(TraceParent(TRACE, SPAN, True), True)
    for none in (None, "", "{}"):
        assert origin_of(mine, none) == Origin(TraceParent(TRACE, "1" * 16, True), False)


json_values = st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda of: st.lists(of) | st.just({}))


@given(
    st.dictionaries(st.just("traceparent") | st.text(), json_values).map(json.dumps)
    | st.text()
    | st.just('"traceparent"')
)
def test_a_context_that_is_not_one_is_ignored(text: str) -> None:
    assert origin_of(text, text) is None


@pytest.mark.parametrize(
    "text", ['{"traceparent": "' + "0" * 10240 + '"}', '{"traceparent":' + "[" * 5000, '"traceparent"' * 10**6]
)
def test_one_that_is_too_long_or_too_deep_is_ignored(text: str) -> None:
    assert origin_of(text, None) is None


def test_it_is_no_sampling_parameter() -> None:
    parameters = json.dumps({"traceparent": HEADER, "max_tokens": 3})
    assert parse_sampling(None, parameters) == SamplingParams(max_tokens=3)
