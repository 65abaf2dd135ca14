"""Which traces are kept, how the share is drawn, and how much of a request is remembered for its spans."""

from __future__ import annotations

import gc
import weakref

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidewright.schema import SequenceTimings, Timings
from tidewright.tracing.catalogue import SPANS
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.context import RequestContext
from tidewright_gateway.metrics import Metrics
from tidewright_gateway.tracing.context import Tracer
from tidewright_gateway.tracing.record import MAX_ENTRIES, MAX_TIMINGS, NO_RECORD, AttemptNote, Record
from tidewright_gateway.tracing.request_trace import RequestTrace
from tidewright_gateway.tracing.traces import Traces, why_kept

WELL = {
    "sampled": False,
    "status": 200,
    "stream_failed": False,
    "attempts_per_generation": 1,
    "seconds": 1.0,
    "first_token_after": 0.5,
    "slow": 10.0,
}
seconds = st.floats(0, 100)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({}, None),
        ({"sampled": True}, "sampled"),
        ({"status": 500}, "error"),
        ({"status": 503, "sampled": True}, "error"),
        ({"status": 408}, "error"),
        ({"stream_failed": True}, "error"),
        ({"attempts_per_generation": 2}, "failover"),
        ({"seconds": 10.0}, "slow"),
        ({"first_token_after": 10.0}, "slow"),
        ({"status": 429}, None),
        ({"status": 401}, None),
        ({"status": 499, "first_token_after": None}, None),
    ],
)
def test_what_is_kept_and_why(how: dict, reason: str | None) -> None:
    assert why_kept(**{**WELL, **how}) == reason


@given(
    st.booleans(),
    st.integers(200, 599),
    st.booleans(),
    st.integers(0, 9),
    seconds,
    st.none() | seconds,
    st.floats(0.01, 100),
)
def test_nothing_that_went_wrong_or_was_slow_is_lost_and_nothing_else_is_kept_unless_sampled(
    sampled: bool, status: int, failed: bool, attempts: int, took: float, first: float | None, slow: float
) -> None:
    kept = why_kept(
        sampled=sampled,
        status=status,
        stream_failed=failed,
        attempts_per_generation=attempts,
        seconds=took,
        first_token_after=first,
        slow=slow,
    )
    is_bad = status in range(500, 600) or status == 408 or failed or attempts > 1
    is_slow = took >= slow or (first is not None and first >= slow)
    assert (kept is not None) == (sampled or is_bad or is_slow)
    assert (kept == "sampled") == (sampled and not is_bad and not is_slow)


@given(st.floats(0, 1), st.integers(1, 2**128 - 1))
def test_the_share_is_of_the_ids_themselves(ratio: float, number: int) -> None:
    header = f"00-{number:032x}-00f067aa0ba902b7-00".encode()
    context = Tracer(ratio).begin([(b"traceparent", header)])
    assert context.sampled == (number % 2**64 < round(ratio * 2**64))
    assert context.sampled == Tracer(ratio).begin([(b"traceparent", header)]).sampled


def test_a_traceparent_of_10_kb_begins_a_new_trace() -> None:
    long = b"cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-" + b"a" * 10240
    assert Tracer(1).begin([(b"traceparent", long)]).trace_id != "4bf92f3577b34da6a3ce929d0e0e4736"


def note(timings: bytes | None = None) -> AttemptNote:
    return AttemptNote("1" * 16, 0, "a:1", "decoder", 1.0, 2.0, 0, 4, "success", timings)


def spans_of(record: Record) -> list:
    context = Tracer(1).begin([])
    trace = RequestTrace(context, record, "POST /v1", {}, None, 1.0, 2.0, None, 1e9)
    spans = trace.spans()
    assert spans[0].span_id == context.span_id
    return spans


def test_what_is_remembered_is_bounded() -> None:
    record = Record()
    for _ in range(1000):
        record.event("settled")
        record.took("queue", 1.0)
        record.tried(note(b"x" * (MAX_TIMINGS + 1)))
    assert len(record.events) == len(record.phases) == len(record.attempts) == MAX_ENTRIES
    assert record.left_out == 3 * (1000 - MAX_ENTRIES)
    assert {one.timings for one in record.attempts} == {None}
    assert len(spans_of(record)) == 1 + 2 * MAX_ENTRIES


@pytest.mark.parametrize("timings", [b"", b"{", b"{}", b'{"arrived": "x"}', b"\xff"])
def test_an_account_that_cannot_be_read_costs_only_its_own_spans(timings: bytes) -> None:
    record = Record()
    record.tried(note(timings))
    assert [span.name for span in spans_of(record)][1:] == ["attempt"]


def test_a_replicas_account_hangs_below_its_attempt() -> None:
    record = Record()
    timings = Timings(5.0, 0.0, 1.0, "", [SequenceTimings(0.1, 0.2, 1, 0, 0.3, 0.4)])
    record.tried(note(msgspec.json.encode(timings)))
    spans = {span.name: span for span in spans_of(record)}
    assert spans["bridge"].parent_id == spans["attempt"].span_id == "1" * 16
    assert spans["engine.decode"].parent_id == spans["bridge"].span_id
    assert spans.keys() - {"POST /v1"} <= SPANS.keys()


def test_the_phase_that_it_failed_in_ends_with_the_request() -> None:
    record = Record()
    record.begin("admit", 1.0)
    record.end()
    record.begin("tokenize", 1.5)
    context = Tracer(1).begin([])
    trace = RequestTrace(context, record, "POST /v1", {"error.type": "invalid_value"}, "x", 1.0, 3.0, None, 0.0)
    root, admit, tokenize = trace.spans()
    assert (admit.error, tokenize.error, tokenize.began, tokenize.ended) == (None, "invalid_value", 1.5, 3.0)
    assert root.error == "x"


def test_a_request_that_has_ended_is_not_kept_alive_by_its_trace(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The exporter is not started, so what it was given waits."""
    file = tmp_path_factory.mktemp("traces") / "spans.jsonl"
    traces = Traces(GatewaySettings(otlp_endpoint=f"file://{file}"), Metrics())
    context = RequestContext("r", Tracer(1).begin([]))
    context.record = traces.record("/v1/completions")
    traces.ended(context, "POST", "/v1/completions", 200, 1.0)
    assert traces._exporter is not None
    assert len(traces._exporter._queue) == 1
    gone = weakref.ref(context)
    del context
    gc.collect()
    assert gone() is None


def test_without_an_endpoint_nothing_is_remembered() -> None:
    assert Traces(GatewaySettings(), Metrics()).record("/v1/completions") is NO_RECORD
