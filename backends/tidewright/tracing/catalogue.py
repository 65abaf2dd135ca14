"""Every span, event and attribute that Tidewright makes, in words: docs/tracing.md and the tests follow this."""

from __future__ import annotations

SPANS: dict[str, str] = {
    "METHOD ROUTE": "the whole request at the gateway, such as `POST /v1/chat/completions`; kind server",
    "admit": "key or token, limits, the body parsed and checked",
    "tokenize": "translation from another API, chat template, tokens",
    "queue": "waits for a place; one for each generation",
    "place": "waits for a replica that can take it; only if none could at once",
    "attempt": "one try at one replica; kind client. Several in a row are a failover",
    "stream": "from the first token to the end of the answer",
    "bridge": "the request in the replica's bridge, from its arrival to its last response",
    "engine.queue": "from the bridge to the first step that computes it",
    "engine.prefill": "from there to its first token",
    "engine.decode": "from its first token to its last",
}

EVENTS: dict[str, str] = {
    "authenticated": "the key or token is known",
    "reserved": "the limits on requests allow it",
    "tokens_reserved": "the limits on tokens allow it",
    "settled": "what it used is booked",
    "validated": "the bridge has checked it",
    "sent_to_engine": "the bridge has handed it to the engine; again after an engine died before the first token",
    "first_token": "the first token is computed",
    "preempted": "the scheduler took its KV blocks for others; what was lost is computed again",
    "replayed": "the engine died, and the next one got it",
}

ATTRIBUTES: dict[str, str] = {
    "http.request.method": "`WEBSOCKET` for /v1/stream",
    "http.route": "the path as the API defines it; `other` for paths that do not exist",
    "http.response.status_code": "499 if the client left before an answer began",
    "error.type": "the error's code, as in the answer",
    "gen_ai.provider.name": "`tidewright`",
    "gen_ai.operation.name": "`chat`, `text_completion` or `embeddings`",
    "gen_ai.request.model": "the served model",
    "gen_ai.request.max_tokens": "of each choice, as it was applied",
    "gen_ai.request.temperature": "as it was applied",
    "gen_ai.request.choice.count": "generations of the request, if there are several",
    "gen_ai.response.finish_reasons": "of the generations, as they ended: `stop`, `length`, `timeout`",
    "gen_ai.usage.input_tokens": "tokens of the prompts",
    "gen_ai.usage.output_tokens": "generated tokens: in all, by this attempt, or by this sequence",
    "gen_ai.usage.cache_read.input_tokens": "prompt tokens that the prefix cache had",
    "tidewright.request_id": "`X-Request-Id`",
    "tidewright.key_id": "the id of the key, never the key",
    "tidewright.kept_because": "`error`, `failover`, `slow` or `sampled`",
    "tidewright.limited_by": "the limit that ended the answer early",
    "tidewright.served_by": "`decoder` or `fallback`",
    "tidewright.cache": "`HIT`, `SHARED`, `MISS` or `BYPASS`, of the first generation",
    "tidewright.left_out": "phases, attempts and events beyond 64 of each, which have no span",
    "tidewright.replica": "address of the replica",
    "tidewright.model": "Triton's model: `decoder` or `fallback`",
    "tidewright.choice": "index of the generation in the request, where it is not the only one",
    "tidewright.outcome": "`success`, or why the attempt ended, as in `attempt_failures_total`",
    "tidewright.tokens_before": "tokens of the generation that earlier attempts had delivered",
    "tidewright.prefill.chunks": "steps that the prompt took",
}
