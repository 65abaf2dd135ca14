"""Every option of the gateway, validated once at start: flags, then `TIDEWRIGHT_GATEWAY_*`, then the defaults here."""

from __future__ import annotations

import ipaddress
import re
import ssl
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from tidewright.cache import EMBEDDED_MODEL
from tidewright.resilience.config import ResilienceSettings
from tidewright_gateway.replicas.discovery import FileSource, make_source


class GatewaySettings(ResilienceSettings, BaseSettings):
    """Options of `tidewright gateway`."""

    model_config = SettingsConfigDict(env_prefix="TIDEWRIGHT_GATEWAY_", extra="forbid", frozen=True)

    model: str = Field(
        EMBEDDED_MODEL, description="The model that the replicas serve, as they name it: its tokenizer is needed."
    )
    served_model_name: str = Field("", description="Its name in the API; empty for the last part of `model`.")
    host: str = Field(
        "127.0.0.1",
        description="Address that the gateway listens on; one that other machines reach needs `keys` or `jwt_jwks`.",
    )
    port: int = Field(8080, ge=1, le=65535, description="The gateway's port.")
    workers: int = Field(1, ge=1, le=256, description="Processes that serve the port; limits hold over all of them.")
    keys: str = Field(
        "",
        repr=False,  # there may be a password in it
        description="API keys that `tidewright keys` made: a YAML file, or redis://HOST:PORT/DB. Empty: "
        "none are asked for.",
    )
    jwt_jwks: str = Field(
        "", description="Public keys of an OpenID provider whose JWTs are taken as well: a URL, or a file. Empty: none."
    )
    jwt_issuer: str = Field("", description="The iss that a JWT must have.")
    jwt_audience: str = Field("", description="The aud that a JWT must have: this gateway's name at the provider.")
    jwt_role_claim: str = Field(
        "tidewright_role", description="Claim of a JWT that names the role admin, alone or in a list; others may use."
    )
    tls_cert: str = Field("", description="PEM file of the certificate and its chain, for HTTPS. Empty: plain HTTP.")
    tls_key: str = Field("", description="PEM file of the certificate's private key, without a passphrase.")
    replicas: str = Field(
        "127.0.0.1:8001",
        description="Tritons to send requests to: gRPC addresses HOST:PORT, separated by commas, with a weight as "
        "HOST:PORT*2; or dns:NAME:PORT, all addresses of a name; or file:PATH, a file with one of them a line.",
    )
    discovery_interval: float = Field(
        5.0, gt=0, le=3600, description="Seconds between two look-ups of dns:NAME:PORT; a file is read twice a second."
    )
    slow_start: float = Field(
        10.0,
        ge=0,
        le=3600,
        description="Seconds in which the share of a replica that came, or came back, grows from a tenth to all of it.",
    )
    generation_probe_interval: float = Field(
        10.0,
        ge=0,
        le=3600,
        description="Seconds after which a replica that answered no request in that time must generate a token; "
        "0 for never.",
    )
    generation_probe_timeout: float = Field(
        10.0, gt=0, le=3600, description="Seconds within which that token must come."
    )
    generation_probe_failures: int = Field(
        2,
        ge=1,
        le=100,
        description="Such tokens that did not come, one after the other, after which it gets nothing until one comes.",
    )
    routing: Literal["round_robin", "least_load", "prefix"] = Field(
        "least_load",
        description="How a replica is chosen: in turn, by least load, or one that has the prompt's beginning in its "
        "KV cache unless it has much more load than others.",
    )
    probe_interval: float = Field(
        0.1,
        gt=0,
        le=60,
        description="Seconds between two questions to a replica; ten times as many while nothing is in flight.",
    )
    patience: float = Field(
        0.5,
        gt=0,
        le=60,
        description="Seconds without a sign of life from a replica after which its streams go on at another.",
    )
    first_token_timeout: float = Field(
        30.0, gt=0, le=3600, description="Seconds until a request without a token is tried at another replica."
    )
    stall_timeout: float = Field(
        10.0, gt=0, le=3600, description="Seconds without a further token after which a stream goes on at another."
    )
    wait_for_replica: float = Field(
        5.0, ge=0, le=600, description="Seconds that a request waits for a replica when none is well, before a 503."
    )
    request_timeout: float = Field(
        600.0, gt=0, le=86400, description="Longest time of a request, in seconds; its own timeout can be shorter."
    )
    max_body: int = Field(
        2 * 1024 * 1024, ge=1024, le=1 << 30, description="Longest body of a request, in bytes; more is a 413."
    )
    max_choices: int = Field(
        32, ge=1, le=4096, description="Prompts of one request times its n, at most; each is a generation."
    )
    fallback: bool = Field(
        True, description="Ask the replicas' model `fallback` where the decoder can't answer; false if they have none."
    )
    max_running: int = Field(
        512, ge=1, le=1_000_000, description="Generations at one time for each replica; others wait their turn."
    )
    max_queue: int = Field(1000, ge=0, le=1_000_000, description="Generations that wait so, at most; more get a 503.")
    queue_timeout: float = Field(60.0, gt=0, le=86400, description="Seconds that one waits, at most, before a 503.")
    limits_store: str = Field(
        "",
        description="Where use is counted that is limited: redis://HOST:PORT/DB (or rediss://) for several gateways; "
        "empty for this one alone.",
    )
    limits_when_lost: Literal["open", "closed"] = Field(
        "open", description="While that can't be reached: serve without limits, or refuse with a 503."
    )
    limit_requests_per_second: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="Of a key that has no limit of its own; 0 for no limit."
    )
    limit_concurrent: int = Field(0, ge=0, description="Its requests that run or wait at one time; 0 for no limit.")
    limit_tokens_per_minute: int = Field(0, ge=0, description="Its tokens, of prompts and answers; 0 for no limit.")
    limit_tokens_per_day: int = Field(0, ge=0, description="The same for each day, by UTC; 0 for no limit.")
    cache_size: int = Field(
        64 * 1024 * 1024,
        ge=0,
        le=1 << 40,
        description="Memory for whole answers that would be the same again, in bytes; 0 keeps none, and lets no two "
        "requests share one generation.",
    )
    cache_ttl: float = Field(600.0, gt=0, le=604_800, description="Seconds that such an answer is kept.")
    ws_max_generations: int = Field(
        100, ge=1, le=10_000, description="Generations that run over one WebSocket connection at a time, at most."
    )
    ws_idle_timeout: float = Field(
        300.0,
        gt=0,
        le=86400,
        description="Seconds after which a WebSocket connection is closed over which nothing runs and nothing is said.",
    )
    ws_send_timeout: float = Field(
        30.0,
        gt=0,
        le=3600,
        description="Seconds that a WebSocket client may leave what it was sent unread, or a ping unanswered, before "
        "it is cut off.",
    )
    ws_ping_interval: float = Field(
        20.0, gt=0, le=3600, description="Seconds between two pings to a WebSocket client, which its library answers."
    )
    ws_resume_grace: float = Field(
        10.0,
        ge=0,
        le=3600,
        description="Seconds that a generation goes on without its WebSocket connection, and that its result is kept, "
        "for the client to resume it.",
    )
    ws_kept: int = Field(
        1000, ge=0, le=1_000_000, description="Generations kept so at a time, at most; the oldest go first."
    )
    ws_kept_bytes: int = Field(
        64 * 1024 * 1024, ge=0, le=1 << 40, description="What they take together, in bytes, at most."
    )
    trace_sample_ratio: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the requests without a traceparent that the replicas are to trace; the decision in a "
        "traceparent stands.",
    )
    read_timeout: float = Field(
        30.0,
        gt=0,
        le=3600,
        description="Seconds that a request may take to arrive; then its connection is closed, with a 408 if the "
        "headers are there.",
    )
    send_timeout: float = Field(
        60.0,
        gt=0,
        le=3600,
        description="Seconds that a client may leave unread what it was sent; then its connection is closed and its "
        "generation ends.",
    )
    channels: int = Field(4, ge=1, le=64, description="gRPC connections to each replica.")
    shutdown_grace: float = Field(
        10.0, ge=0, description="Seconds that running requests get to finish after Ctrl-C or SIGTERM."
    )
    access_log: str = Field(
        "", description="File that gets a line of JSON for each request; - is standard output. Empty: none."
    )
    log_level: Literal["info", "warning", "error"] = Field("warning", description="Lowest level to log.")

    @field_validator("replicas")
    @classmethod
    def _replicas_can_be_found(cls, value: str) -> str:
        source = make_source(value, interval=1.0)
        if isinstance(source, FileSource):
            source.read()
        return value

    @model_validator(mode="after")
    def _others_need_a_key(self) -> GatewaySettings:
        if not (self.keys or self.jwt_jwks or _is_loopback(self.host)):
            raise ValueError(
                f"host is {self.host}, which other machines can reach, but no keys are asked for; set keys "
                "(`tidewright keys create` makes the first) or jwt_jwks, or listen on 127.0.0.1"
            )
        return self

    @model_validator(mode="after")
    def _keys_can_be_found(self) -> GatewaySettings:
        if "://" in self.keys and not self.keys.startswith(("redis://", "rediss://")):
            raise ValueError("keys is neither the path of a file nor redis://HOST:PORT/DB nor rediss://HOST:PORT/DB")
        if (bool(self.jwt_jwks), bool(self.jwt_issuer)) != (bool(self.jwt_audience),) * 2:
            raise ValueError("jwt_jwks, jwt_issuer and jwt_audience go together: set all three or none")
        url = urlsplit(self.jwt_jwks) if "://" in self.jwt_jwks else None
        if url and url.scheme != "https" and not (url.scheme == "http" and _is_loopback(url.hostname or "")):
            raise ValueError("jwt_jwks must be https://..., or whoever is on the way could put keys of their own in")
        return self

    @model_validator(mode="after")
    def _certificate_is_whole(self) -> GatewaySettings:
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError("tls_cert and tls_key go together: set both or none")
        if self.tls_cert:
            for name, path in (("tls_cert", self.tls_cert), ("tls_key", self.tls_key)):
                if not Path(path).is_file():
                    raise ValueError(f"{name}: no such file: {path}")
            try:  # a passphrase would be asked for on the terminal, which a server has none of
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.tls_cert, self.tls_key, password="")
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"tls_cert and tls_key are no certificate and its key in PEM, without a passphrase: {error}"
                ) from None
        return self

    @field_validator("limits_store")
    @classmethod
    def _limits_store_is_redis(cls, value: str) -> str:
        if value and not re.match(r"rediss?://[^/]", value):
            raise ValueError("must be redis://HOST:PORT/DB, rediss:// for TLS, or empty")
        return value

    @property
    def model_name(self) -> str:
        return self.served_model_name or Path(self.model).name


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
