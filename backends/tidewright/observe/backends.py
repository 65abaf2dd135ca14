"""Asks a tracing backend for a trace: Jaeger's query API, or Phoenix'."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import httpx

from tidewright.address import check_url, without_user
from tidewright.observe.timeline import REQUEST_ID, Event, Span, unix_time

TIMEOUT = 10.0  # seconds
_PAGE = 1000  # spans of an answer
_MAX_PAGES = 20
_MAX_TRACES = 20  # of one request id
_PHOENIX_PROJECT = "default"


class BackendError(Exception):
    """It can't be asked, or is none; the message says what to change."""


def ask(url: str, wanted: str) -> list[Span]:
    """Spans of the trace `wanted`; if it is a request's id, of its trace as far as the backend can search for it.

    Raises:
        BackendError: the backend can't be asked.
    """
    base = url.rstrip("/")
    try:
        check_url(base, "http", "https")
    except ValueError as error:
        message = (
            f"{without_user(url)} is neither a file nor the address of a tracing backend (http://HOST:PORT): {error}"
        )
        raise BackendError(message) from None
    with httpx.Client(timeout=TIMEOUT, trust_env=False) as client:
        try:
            services = client.get(f"{base}/api/services")
            if services.status_code == 200 and services.headers.get("content-type", "").startswith("application/json"):
                return _jaeger(client, base, wanted)
            return _phoenix(client, base, wanted)
        except httpx.HTTPError as error:
            raise BackendError(f"{url} can't be asked: {error or type(error).__name__}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BackendError(f"{url} does not answer as Jaeger or Phoenix do") from None


def is_trace_id(wanted: str) -> bool:
    return len(wanted) == 32 and all(character in "0123456789abcdef" for character in wanted)


def _jaeger(client: httpx.Client, base: str, wanted: str) -> list[Span]:
    """https://www.jaegertracing.io/docs/apis/: the JSON of its UI."""
    if is_trace_id(wanted):
        answer = client.get(f"{base}/api/traces/{wanted}")
    else:
        tags = f'{{"{REQUEST_ID}":"{quote(wanted, safe="")}"}}'
        answer = client.get(
            f"{base}/api/traces", params={"service": "tidewright-gateway", "tags": tags, "limit": _MAX_TRACES}
        )
    if answer.status_code == 404:
        return []
    answer.raise_for_status()
    found = []
    for trace in answer.json()["data"] or ():
        services = {key: process["serviceName"] for key, process in trace["processes"].items()}
        found += [_of_jaeger(span, services.get(span.get("processID"), "")) for span in trace["spans"]]
    return found


def _of_jaeger(span: dict[str, Any], service: str) -> Span:
    attributes = {tag["key"]: tag["value"] for tag in span.get("tags") or ()}
    parents = [one["spanID"] for one in span.get("references") or () if one.get("refType") == "CHILD_OF"]
    failed = attributes.get("error") in (True, "true")
    began = span["startTime"] / 1e6
    events = []
    for log in span.get("logs") or ():
        fields = {one["key"]: one["value"] for one in log["fields"]}
        events.append(Event(log["timestamp"] / 1e6, str(fields.pop("event", "log")), fields))
    return Span(
        trace_id=span["traceID"].zfill(32),
        span_id=span["spanID"],
        parent_id=parents[0] if parents else "",
        name=span["operationName"],
        service=service,
        began=began,
        ended=began + span["duration"] / 1e6,
        attributes=attributes,
        events=events,
        error=str(attributes.get("otel.status_description", "")) if failed else None,
    )


def _phoenix(client: httpx.Client, base: str, wanted: str) -> list[Span]:
    """Its REST API gives a project's spans; of those with this trace only where it can filter."""
    found: list[Span] = []
    parameters: dict[str, str | int] = {"limit": _PAGE}
    if is_trace_id(wanted):
        parameters["trace_id"] = wanted
    for _ in range(_MAX_PAGES):
        answer = client.get(f"{base}/v1/projects/{_PHOENIX_PROJECT}/spans", params=parameters)
        answer.raise_for_status()
        told = answer.json()
        found += map(_of_phoenix, told["data"])
        if not (cursor := told.get("next_cursor")):
            break
        parameters["cursor"] = cursor
    traces = {span.trace_id for span in found if wanted in (span.trace_id, span.attributes.get(REQUEST_ID))}
    return [span for span in found if span.trace_id in traces]


def _of_phoenix(span: dict[str, Any]) -> Span:
    return Span(
        trace_id=span["context"]["trace_id"],
        span_id=span["context"]["span_id"],
        parent_id=span.get("parent_id") or "",
        name=span["name"],
        service="",  # Phoenix does not tell
        began=unix_time(span["start_time"]),
        ended=unix_time(span["end_time"]),
        attributes=span.get("attributes") or {},
        events=[
            Event(unix_time(event["timestamp"]), str(event["name"]), event.get("attributes") or {})
            for event in span.get("events") or ()
        ],
        error=str(span.get("status_message") or "") if span.get("status_code") == "ERROR" else None,
    )
