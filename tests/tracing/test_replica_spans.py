"""From a replica's account of a request to its spans."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tidewright.schema import SequenceTimings, Timings
from tidewright.tracing.catalogue import EVENTS, SPANS
from tidewright.tracing.replica_spans import replica_spans

PARENT = "00f067aa0ba902b7"


def test_each_stretch_follows_the_one_before() -> None:
    times = SequenceTimings(0.25, 0.5, 3, 16, 1.0, 2.0, 9, [("preempted", 0.75), ("replayed", 1.5)])
    bridge, queue, prefill, decode = replica_spans(Timings(100.0, 0.125, 2.5, "", [times]), PARENT, "a:1")
    assert (bridge.name, bridge.parent_id, bridge.began, bridge.ended) == ("bridge", PARENT, 100.0, 102.5)
    assert bridge.attributes == {"tidewright.replica": "a:1"}
    assert [(event.name, event.at) for event in bridge.events] == [("validated", 100.125), ("sent_to_engine", 100.25)]
    assert [(one.name, one.began, one.ended) for one in (queue, prefill, decode)] == [
        ("engine.queue", 100.25, 100.5),
        ("engine.prefill", 100.5, 101.0),
        ("engine.decode", 101.0, 102.0),
    ]
    assert {one.parent_id for one in (queue, prefill, decode)} == {bridge.span_id}
    assert prefill.attributes == {"tidewright.prefill.chunks": 3, "gen_ai.usage.cache_read.input_tokens": 16}
    assert decode.attributes == {"gen_ai.usage.output_tokens": 9}
    assert [event.name for event in prefill.events] == ["preempted"]
    assert [event.name for event in decode.events] == ["first_token", "replayed"]


def test_below_tritons_own_span_and_with_the_index_of_each_of_several() -> None:
    waiting, nothing = SequenceTimings(sent=0.5), SequenceTimings()
    bridge, queue = replica_spans(Timings(1.0, 0.0, 2.0, "1" * 16, [waiting, nothing]), PARENT, error="timeout")
    assert (bridge.parent_id, bridge.error) == ("1" * 16, "timeout")
    assert (queue.name, queue.began, queue.ended, queue.attributes) == (
        "engine.queue",
        1.5,
        3.0,
        {"tidewright.choice": 0},
    )


moments = st.none() | st.floats(-10, 10)
sequences = st.builds(
    SequenceTimings,
    moments,
    moments,
    st.integers(0, 5),
    st.integers(0, 5),
    moments,
    moments,
    st.integers(0, 5),
    st.lists(st.tuples(st.sampled_from(["preempted", "replayed"]), st.floats(-10, 10)), max_size=4),
)


@given(st.builds(Timings, st.floats(0, 2e9), st.floats(0, 5), st.floats(0, 5), st.just(""), st.lists(sequences)))
def test_whatever_a_replica_tells_comes_to_well_formed_spans(timings: Timings) -> None:
    """Clocks may be wrong, and phases missing."""
    spans = replica_spans(timings, PARENT)
    assert {span.name for span in spans} <= SPANS.keys()
    assert all(span.began <= span.ended for span in spans)
    assert {span.parent_id for span in spans[1:]} <= {spans[0].span_id}
    events = [event.name for span in spans for event in span.events]
    assert set(events) <= EVENTS.keys()
    told = [event for sequence in timings.sequences if sequence.sent is not None for event in sequence.events]
    assert sum(name in ("preempted", "replayed") for name in events) == len(told)
