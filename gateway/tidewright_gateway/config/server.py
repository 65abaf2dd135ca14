"""Options of the listening socket and of client connections."""

from __future__ import annotations

from pydantic import BaseModel, Field

from tidewright.cache import EMBEDDED_MODEL
from tidewright.served_models import Listed, NamedModel


class ServerSettings(BaseModel):
    model: str = Field(
        EMBEDDED_MODEL,
        min_length=1,
        description="Model that the replicas serve; the gateway needs its tokenizer. As in `serve`.",
    )
    models: Listed[NamedModel] = Field(
        [],
        description="Further models of the replicas, under the names that they have in `serve`. The flag is `--model` "
        "once more, as SOURCE or NAME=SOURCE; a variable has several with commas between.",
    )
    served_model_name: str = Field(
        "", description="Model name in the API. Empty: the last part of `model`, without a revision."
    )
    smaller_model: str = Field(
        "",
        description="Name of one of `models` that answers new requests for `model` while the load is at least halfway "
        "between the thresholds of short answers and of the fallback (docs/serving.md). Empty: none.",
    )
    host: str = Field(
        "127.0.0.1",
        description="Address to listen on. One that other machines can reach requires `keys` or `jwt_jwks`.",
    )
    port: int = Field(8080, ge=1, le=65535, description="Port to listen on.")
    workers: int = Field(1, ge=1, le=256, description="Worker processes on that port. Limits hold across all of them.")
    tls_cert: str = Field(
        "", description="PEM file with the certificate chain, for HTTPS. Reloaded when it changes. Empty: plain HTTP."
    )
    tls_key: str = Field("", description="PEM file with the certificate's private key, unencrypted.")
    allowed_hosts: str = Field(
        "",
        description="Comma-separated host names accepted in the Host header, in addition to `host` and the loopback "
        "names. Empty: any if keys are required, none otherwise.",
    )
    trusted_proxies: str = Field(
        "",
        description="Comma-separated addresses or networks of proxies whose X-Forwarded-For names the client in the "
        "access log. Empty: none, the log has the connection's address.",
    )
    cors_origins: str = Field(
        "", description="Comma-separated origins whose pages may call the API from a browser; * for all. Empty: none."
    )
    max_connections: int = Field(
        10_000, ge=1, le=1_000_000, description="Maximum open client connections; beyond it, 503."
    )
    max_body: int = Field(
        2 * 1024 * 1024, ge=1024, le=1 << 30, description="Maximum request body in bytes; beyond it, 413."
    )
    max_choices: int = Field(32, ge=1, le=4096, description="Maximum generations of one request: prompts times n.")
    read_timeout: float = Field(
        30.0, gt=0, le=3600, description="Seconds that a request may take to arrive; beyond it, 408."
    )
    send_timeout: float = Field(
        60.0,
        gt=0,
        le=3600,
        description="Seconds that a client may leave sent data unread before its connection is closed.",
    )
    keep_alive: float = Field(
        75.0,
        ge=1,
        le=3600,
        description="Seconds that a connection without a request stays open. Longer than clients and proxies in front "
        "keep theirs: one that is closed here at the moment in which they use it loses its request.",
    )
    sse_keep_alive: float = Field(
        15.0,
        ge=0,
        le=3600,
        description="Seconds of silence in an event stream before a keep-alive comment is sent, so that proxies do not "
        "time out. 0: never.",
    )
    request_timeout: float = Field(
        600.0, gt=0, le=86400, description="Maximum duration of a request in seconds; its own `timeout` can be shorter."
    )
    shutdown_grace: float = Field(
        10.0,
        ge=0,
        description="Seconds that running requests get to finish after Ctrl-C or SIGTERM; what still runs then ends "
        "with the error `going_away`. `tidewright serve` gives its gateway 1 s more than itself.",
    )
