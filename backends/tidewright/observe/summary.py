"""What a timeline says in a few lines: how the request ended, who served it, what delayed it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from tidewright.observe.timeline import ACCESS_EVENTS, REQUEST_ID, Timeline

MAX_PARTS = 6  # of the time


def summary(timeline: Timeline) -> list[tuple[str, str]]:
    """Pairs of a word and what is to be said."""
    return [(name, text) for name, text in _facts(timeline) if text]


def _facts(timeline: Timeline) -> Iterable[tuple[str, str]]:
    spans = [node.span for node in timeline.nodes]
    tops = [node.span for node in timeline.nodes if node.depth == 0]
    access = [line.facts for line in timeline.lines if line.event in ACCESS_EVENTS]
    attempts = [span for span in spans if span.name == "attempt"]
    events = Counter(event.name for span in spans for event in span.events)

    yield "request", _words({*_values(tops, REQUEST_ID), *(facts.get("request_id") for facts in access)})
    yield "trace", _words({span.trace_id for span in spans} or {facts.get("trace_id") for facts in access})
    yield "what", _words([span.name for span in tops] or [_what(facts) for facts in access])
    yield "key", _words({*_values(tops, "tidewright.key_id"), *(facts.get("key_id") for facts in access)})
    status = [*_values(tops, "http.response.status_code"), *(facts.get("status") for facts in access)]
    yield "status", _words(dict.fromkeys(status))
    errors = [*_values(tops, "error.type"), *(facts.get("error") for facts in access)]
    yield "error", _words(dict.fromkeys(errors))
    limits = [*_values(tops, "tidewright.limited_by"), *(facts.get("limited_by") for facts in access)]
    yield "limited by", _words(dict.fromkeys(limits))
    yield "took", _took(timeline, access)
    yield "spent in", _parts(timeline)
    served = [*_values(tops, "tidewright.served_by"), *(facts.get("served_by") for facts in access)]
    yield "served by", _words(dict.fromkeys(served))
    replicas = _values(attempts, "tidewright.replica") or [
        replica for facts in access for replica in facts.get("replicas") or ()
    ]
    yield "replicas", _words(dict.fromkeys(replicas))
    failed = [f"{span.attributes.get('tidewright.outcome')} at {span.attributes.get('tidewright.replica')}"
              for span in attempts if span.error is not None]  # fmt: skip
    yield "failed attempts", _words(failed)
    yield "preempted", _times(events["preempted"])
    yield "replayed", _times(events["replayed"], ", as the engine died")
    cached = _values(spans, "gen_ai.usage.cache_read.input_tokens")
    prompt, output = (
        _values(tops, f"gen_ai.usage.{kind}_tokens") or [facts.get(f"{word}_tokens") for facts in access]
        for kind, word in (("input", "prompt"), ("output", "completion"))
    )
    if any(prompt) or any(output):
        found = f" ({max(map(int, cached))} cached)" if cached else ""
        yield "tokens", f"{_words(prompt) or 0} in{found}, {_words(output) or 0} out"
    yield "trace kept", _words(_values(tops, "tidewright.kept_because"))


def _times(count: int, why: str = "") -> str:
    return f"{count} time{'s' if count > 1 else ''}{why}" if count else ""


def _took(timeline: Timeline, access: list[Any]) -> str:
    seconds = [node.span.seconds for node in timeline.nodes if node.depth == 0]
    seconds = seconds or [float(facts["seconds"]) for facts in access if "seconds" in facts]
    first = [facts["first_token_seconds"] for facts in access if facts.get("first_token_seconds")]
    text = ", ".join(f"{1000 * value:.1f} ms" for value in seconds)
    return text + (f"; first token after {1000 * float(first[0]):.1f} ms" if text and first else "")


def _parts(timeline: Timeline) -> str:
    parts = timeline.exclusive()
    total = sum(parts.values())
    shown = list(parts.items())[:MAX_PARTS]
    return (
        ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in shown if seconds / total >= 0.005)
        if total
        else ""
    )


def _what(facts: Any) -> str:
    return f"{facts.get('method', '')} {facts.get('path', '')}".strip()


def _values(spans: Iterable[Any], name: str) -> list[Any]:
    return [span.attributes[name] for span in spans if name in span.attributes]


def _words(values: Iterable[Any]) -> str:
    return ", ".join(str(value) for value in values if value not in (None, ""))
