"""Hooks that make an OpenTelemetry span of each call, and tell the gateway of it. Needs the extra `otel`."""

from __future__ import annotations

from tidewright_client import extras

try:
    from opentelemetry import propagate, trace
except ImportError:
    raise extras.missing("OtelHooks", "opentelemetry-api", "otel") from None

from tidewright_client.answers import Answer
from tidewright_client.errors import TidewrightError
from tidewright_client.hooks import CallInfo, Hooks

_SPAN = "otel.span"
_OPERATIONS = {"chat": "chat", "complete": "text_completion"}


class OtelHooks(Hooks):
    """`Client(hooks=OtelHooks())`. Names are those of OpenTelemetry's conventions for generative AI."""

    def __init__(self, provider: trace.TracerProvider | None = None) -> None:
        """`provider`: default: the global one."""
        self._tracer = trace.get_tracer("tidewright_client", tracer_provider=provider)

    def on_request(self, call: CallInfo) -> None:
        operation = _OPERATIONS.get(call.operation, call.operation)
        attributes: dict[str, str | bool] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "tidewright",
            "server.address": call.url,
            "tidewright.stream": call.is_stream,
        }
        if call.model:
            attributes["gen_ai.request.model"] = call.model
        name = f"{operation} {call.model}" if call.model else operation
        span = self._tracer.start_span(name, kind=trace.SpanKind.CLIENT, attributes=attributes)
        call.state[_SPAN] = span
        propagate.inject(call.headers, trace.set_span_in_context(span))

    def on_retry(self, call: CallInfo, error: TidewrightError, wait: float) -> None:
        told: dict[str, str | float] = {
            "error.type": type(error).__name__,
            "error.message": error.message,
            "wait": wait,
        }
        _span(call).add_event("retry", told)

    def on_first_token(self, call: CallInfo) -> None:
        _span(call).add_event("first_token")

    def on_end(self, call: CallInfo, answer: Answer | None, error: TidewrightError | None) -> None:
        span = _span(call)
        if answer:
            if answer.finish_reason:
                span.set_attribute("gen_ai.response.finish_reasons", [answer.finish_reason])
            if answer.request_id:
                span.set_attribute("gen_ai.response.id", answer.request_id)
            if answer.usage:
                span.set_attribute("gen_ai.usage.input_tokens", answer.usage.prompt_tokens)
                span.set_attribute("gen_ai.usage.output_tokens", answer.usage.completion_tokens)
        if call.retries:
            span.set_attribute("http.request.resend_count", call.retries)
        if error:
            span.set_attribute("error.type", error.code or type(error).__name__)
            span.set_status(trace.StatusCode.ERROR, error.message)
        span.end()


def _span(call: CallInfo) -> trace.Span:
    span = call.state.get(_SPAN, trace.INVALID_SPAN)
    assert isinstance(span, trace.Span)
    return span
