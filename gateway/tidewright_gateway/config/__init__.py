"""Every option of the gateway, in groups, validated once at start.

Precedence: flags, then `TIDEWRIGHT_GATEWAY_*`, then the YAML file, then the defaults of the groups.
"""

from __future__ import annotations

import ipaddress
import re
import ssl
from pathlib import Path
from typing import Any

from pydantic import BaseModel, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from tidewright.address import check_redis_url, check_url
from tidewright.config_file import sources
from tidewright.resilience.config import ResilienceSettings
from tidewright.served_models import check_names, served_name
from tidewright_gateway.config.api import ApiSettings
from tidewright_gateway.config.auth import AuthSettings
from tidewright_gateway.config.cache import CacheSettings
from tidewright_gateway.config.health import HealthSettings
from tidewright_gateway.config.limits import LimitSettings
from tidewright_gateway.config.observability import ObservabilitySettings
from tidewright_gateway.config.routing import RoutingSettings
from tidewright_gateway.config.server import ServerSettings
from tidewright_gateway.config.websocket import WebSocketSettings
from tidewright_gateway.replicas.credentials import check_pem
from tidewright_gateway.replicas.discovery import FileSource, make_source

CONFIG_FILE_VARIABLE = "TIDEWRIGHT_GATEWAY_CONFIG"
GROUPS: dict[str, type[BaseModel]] = {
    "server": ServerSettings,
    "api": ApiSettings,
    "auth": AuthSettings,
    "limits": LimitSettings,
    "routing": RoutingSettings,
    "health": HealthSettings,
    "cache": CacheSettings,
    "websocket": WebSocketSettings,
    "observability": ObservabilitySettings,
    "resilience": ResilienceSettings,
}
"""In the order of help, docs and file."""


class GatewaySettings(
    ResilienceSettings,
    ObservabilitySettings,
    WebSocketSettings,
    CacheSettings,
    HealthSettings,
    RoutingSettings,
    LimitSettings,
    AuthSettings,
    ApiSettings,
    ServerSettings,
    BaseSettings,
):
    """Options of `tidewright gateway`. pydantic lists the fields of the last base first, as help, docs and file do."""

    model_config = SettingsConfigDict(env_prefix="TIDEWRIGHT_GATEWAY_", extra="forbid", frozen=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        groups = {name: tuple(group.model_fields) for name, group in GROUPS.items()}
        return sources((init_settings, env_settings), settings_cls, CONFIG_FILE_VARIABLE, groups)

    def in_groups(self) -> dict[str, dict[str, Any]]:
        """As the YAML file has them; passwords in addresses are left out."""
        values = {name: _without_password(value) for name, value in self.model_dump().items()}
        return {name: {field: values[field] for field in group.model_fields} for name, group in GROUPS.items()}

    @field_validator("replicas")
    @classmethod
    def _replicas_can_be_found(cls, value: str) -> str:
        source = make_source(value, interval=1.0)
        if isinstance(source, FileSource):
            source.read()
        return value

    @model_validator(mode="after")
    def _names_differ(self) -> GatewaySettings:
        check_names(self.model_name, self.models)
        if self.smaller_model and self.smaller_model not in {one.name for one in self.models}:
            raise ValueError(f"smaller_model is {self.smaller_model!r}, which is none of `models`: add it there")
        return self

    @model_validator(mode="after")
    def _others_need_a_key(self) -> GatewaySettings:
        if not (self.asks_for_keys or _is_loopback(self.host)):
            raise ValueError(
                f"host is {self.host}, which other machines can reach, but no keys are asked for; set keys "
                "(`tidewright keys create` makes the first) or jwt_jwks, or listen on 127.0.0.1"
            )
        return self

    @model_validator(mode="after")
    def _keys_can_be_found(self) -> GatewaySettings:
        if "://" in self.keys:
            try:
                check_redis_url(self.keys)
            except ValueError as error:
                raise ValueError(
                    f"keys is neither the path of a file nor redis://HOST:PORT/DB nor rediss://HOST:PORT/DB: {error}"
                ) from None
        if (bool(self.jwt_jwks), bool(self.jwt_issuer)) != (bool(self.jwt_audience),) * 2:
            raise ValueError("jwt_jwks, jwt_issuer and jwt_audience go together: set all three or none")
        url = None
        if "://" in self.jwt_jwks:
            try:
                url = check_url(self.jwt_jwks, "https", "http")
            except ValueError as error:
                raise ValueError(f"jwt_jwks must be https://HOST/PATH: {error}") from None
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

    @model_validator(mode="after")
    def _replica_certificate_is_whole(self) -> GatewaySettings:
        if bool(self.replica_cert) != bool(self.replica_key):
            raise ValueError("replica_cert and replica_key go together: set both or none")
        for name in ("replica_ca", "replica_cert", "replica_key"):
            if getattr(self, name) and not self.replica_tls:
                raise ValueError(f"{name} needs replica_tls: true")
        check_pem(self.replica_ca, self.replica_cert, self.replica_key)
        return self

    @field_validator("limits_store", "response_store")
    @classmethod
    def _store_is_redis(cls, value: str) -> str:
        try:
            if value:
                check_redis_url(value)
        except ValueError as error:
            raise ValueError(f"must be redis://HOST:PORT/DB, rediss:// for TLS, or empty: {error}") from None
        return value

    @property
    def asks_for_keys(self) -> bool:
        return bool(self.keys or self.jwt_jwks)

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls_cert else 'http'}://{host}:{self.port}"

    @property
    def model_name(self) -> str:
        return self.served_model_name or served_name(self.model)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _without_password(value: Any) -> Any:
    return re.sub(r"(?<=://)([^/@:]*):[^/@]*@", r"\1:***@", value) if isinstance(value, str) else value
