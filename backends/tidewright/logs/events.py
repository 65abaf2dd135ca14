"""The catalogue of event names: stable words to search and alert by, whatever the message says.

A test holds the code and docs/logging.md to it.
"""

from __future__ import annotations

from typing import Any

INTERNAL_ERROR, NOTE, OUTPUT = "internal_error", "note", "output"

EVENTS: dict[str, str] = {
    # serve and its watchdog
    "ready": "serve has got a first token through the whole chain.",
    "start_failed": "serve or gateway could not start; the message says what to change.",
    "stopping": "serve was asked to stop, and drains.",
    "watchdog": "What the watchdog saw or did: a model that does not answer, a reload, a restart.",
    "memory_moved": "serve gave some of one model's memory to another; the message has the sizes, and why.",
    "gave_up": "serve ends, because tritonserver does not stay well.",
    # bridge and engine
    "engine_ready": "The first engine process of a bridge has loaded its model.",
    "engine_died": "An engine process ended; another takes its place.",
    "engine_restarted": "An engine process has taken the place of one that died.",
    "engine_start_failed": "A spare engine could not be started; it is tried again.",
    "out_of_memory": "A step ran out of memory; smaller ones compute the same, and no request is lost.",
    "kv_cache_shrunk": "An engine that took another's place has a smaller KV cache, for there is less memory.",
    "kv_cache_resized": "The KV cache grew or shrank while requests run, by request or because memory is short.",
    "threads_changed": "Steps compute with fewer threads, because other processes use the cores, or with more again.",
    "rank_lost": "A tensor-parallel rank is gone or was refused.",
    "request_received": "A replica has taken a request (level debug).",
    "request_ended": "A replica has ended a request (level debug).",
    # failsafe
    "decoder_trouble": "failsafe sees that the decoder can't work.",
    "decoder_recovered": "failsafe sees that it can again.",
    # gateway
    "gateway_ready": "The gateway listens.",
    "request": "Access log: a request that got an answer, or whose client left.",
    "request_refused": "Access log: a request that got an error status. On a replica: one that it refused.",
    "replica_up": "A replica takes requests.",
    "replica_down": "A replica takes no requests; the message says why.",
    "adapter_loaded": "A replica has loaded a LoRA adapter.",
    "adapter_unloaded": "A replica has unloaded a LoRA adapter; requests that have it finish.",
    "adapter_refused": "A replica did not load or unload a LoRA adapter as it was told; the message says why.",
    "replica_drained": "An operator drains a replica.",
    "model_changed": "An operator loads or unloads one of several models.",
    "attempt_failed": "A replica failed at a request, or refused it for load; another is tried, or the fallback.",
    "breaker_opened": "The breaker of a replica lets no requests through.",
    "breaker_closed": "It lets them through again.",
    "degradation": "The ladder's level has risen.",
    "degradation_lifted": "The ladder's level has fallen.",
    "store_lost": "The store of limits or responses can't be used as it should.",
    "store_recovered": "It can again.",
    "keys_stale": "API keys or JWT keys can't be read again; those read before are used.",
    "keys_reloaded": "They can again.",
    "keys_missing": "The key store is empty, so every API key is refused.",
    "keys_found": "It has keys again.",
    "key_rejected": "An entry of the key store can't be used.",
    "discovery_failed": "The replicas can't be looked up; those known are used.",
    "discovery_recovered": "They can again.",
    "certificate_reloaded": "The certificate file has changed, and is in use.",
    "certificate_stale": "It has changed, and can't be used; the one before stays.",
    # any process
    INTERNAL_ERROR: "A fault of Tidewright's own, with its exception.",
    "log_lines_dropped": "The log could not be written for a while; how many lines are missing.",
    OUTPUT: "A line that a process below serve printed without a format, such as the last words of a crash.",
    NOTE: "All that has no name.",
}


def event(name: str, **fields: Any) -> dict[str, Any]:
    """For `extra` of a log call. `fields`: of `records.FIELDS`, or others; None is left out."""
    assert name in EVENTS, name
    return {"event": name, "fields": fields}
