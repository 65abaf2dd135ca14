"""Decides when a request has ended whether its trace is kept, and has it exported.

The decision waits for the end: errors and slow requests are kept, however few of all requests are.
"""

from __future__ import annotations

import time
from typing import Literal

from tidewright.tracing.exporter import Exporter
from tidewright.tracing.span import Value
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.context import RequestContext
from tidewright_gateway.metrics import Metrics
from tidewright_gateway.probes import is_probe
from tidewright_gateway.tracing.record import NO_RECORD, Record
from tidewright_gateway.tracing.request_trace import RequestTrace

Reason = Literal["error", "failover", "slow", "sampled"]

STOP_TIMEOUT = 3.0  # seconds for what waits at the end
_TIMED_OUT = 408


def why_kept(
    *,
    sampled: bool,
    status: int,
    stream_failed: bool,
    attempts_per_generation: int,
    seconds: float,
    first_token_after: float | None,
    slow: float,
) -> Reason | None:
    """Why a trace is kept; None if it is not.

    Args:
        stream_failed: an answer that began ended with an error.
        attempts_per_generation: most that one generation needed.
        slow: seconds to the first token, or in all.
    """
    if status >= 500 or status == _TIMED_OUT or stream_failed:
        return "error"
    if attempts_per_generation > 1:
        return "failover"
    if seconds >= slow or (first_token_after or 0.0) >= slow:
        return "slow"
    return "sampled" if sampled else None


class Traces:
    def __init__(self, settings: GatewaySettings, metrics: Metrics) -> None:
        """Raises ValueError: the endpoint can't be used."""
        self._slow, self._model = settings.trace_slow, settings.model_name
        self._exporter: Exporter | None = None
        if settings.otlp_endpoint:
            self._exporter = Exporter(settings.otlp_endpoint, metrics.spans_exported, metrics.spans_dropped)

    def start(self) -> None:
        if self._exporter:
            self._exporter.start()

    def stop(self) -> None:
        """Blocks for a while."""
        if self._exporter:
            self._exporter.stop(STOP_TIMEOUT)

    def record(self, path: str) -> Record:
        """For a request that begins; one that notes nothing if its trace is not exported anyway."""
        return Record() if self._exporter and not is_probe(path.rstrip("/")) else NO_RECORD

    def ended(self, context: RequestContext, method: str, route: str, status: int, seconds: float) -> None:
        if self._exporter is None or not context.record.is_kept:
            return
        reason = why_kept(
            sampled=context.trace.sampled,
            status=status,
            stream_failed=status < 400 and context.error is not None,
            attempts_per_generation=max((len(one.served_by) for one in context.generations), default=0),
            seconds=seconds,
            first_token_after=context.first_token_after,
            slow=self._slow,
        )
        if reason is None:
            return
        failed = status >= 500 or reason == "error"
        first = context.first_token_after
        self._exporter.put(
            RequestTrace(
                context.trace,
                context.record,
                f"{method} {route}",
                self._attributes(context, method, route, status, reason),
                (context.error.code if context.error else "") if failed else None,
                context.arrived_at,
                context.arrived_at + seconds,
                None if first is None else context.arrived_at + first,
                time.time() - time.monotonic(),
            )
        )

    def _attributes(
        self, context: RequestContext, method: str, route: str, status: int, reason: Reason
    ) -> dict[str, Value]:
        found: dict[str, Value] = {
            "http.request.method": method,
            "http.route": route,
            "http.response.status_code": status,
            "tidewright.request_id": context.request_id,
            "tidewright.key_id": context.caller.key_id,
            "tidewright.kept_because": reason,
        }
        if context.error:
            found["error.type"] = context.error.code
        if context.limited_by:
            found["tidewright.limited_by"] = context.limited_by
        if context.record.left_out:
            found["tidewright.left_out"] = context.record.left_out
        if context.generations:
            self._add_generation(found, context)
        return found

    def _add_generation(self, found: dict[str, Value], context: RequestContext) -> None:
        first = context.generations[0]
        found |= {
            "gen_ai.provider.name": "tidewright",
            "gen_ai.operation.name": _operation(context),
            "gen_ai.request.model": context.served.name if context.served else self._model,
            "gen_ai.usage.input_tokens": context.num_prompt_tokens,
        }
        if first.embeds:
            return
        found |= {
            "gen_ai.request.max_tokens": first.sampling.max_tokens,
            "gen_ai.request.temperature": float(first.sampling.temperature),
            "gen_ai.usage.output_tokens": context.num_tokens,
            "gen_ai.usage.cache_read.input_tokens": context.num_cached_tokens,
        }
        if context.finish_reasons:
            found["gen_ai.response.finish_reasons"] = context.finish_reasons
        if len(context.generations) > 1:
            found["gen_ai.request.choice.count"] = len(context.generations)
        if context.models:
            found["tidewright.served_by"] = context.served_by
        if context.cache_states:
            found["tidewright.cache"] = context.cache_states[0].value


def _operation(context: RequestContext) -> str:
    if context.generations[0].embeds:
        return "embeddings"
    return "chat" if context.prompt_end else "text_completion"
