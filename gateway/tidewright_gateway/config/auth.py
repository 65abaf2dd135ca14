"""Options of API keys and JWTs."""

from __future__ import annotations

from pydantic import BaseModel, Field


class AuthSettings(BaseModel):
    keys: str = Field(
        "",
        repr=False,  # may hold a password
        description="API keys made by `tidewright keys`: a YAML file or redis://HOST:PORT/DB. Empty: no keys required.",
    )
    jwt_jwks: str = Field(
        "", description="JWKS of an OpenID provider whose JWTs are accepted: a URL or a file. Empty: no JWTs."
    )
    jwt_issuer: str = Field("", description="Required `iss` of a JWT.")
    jwt_audience: str = Field("", description="Required `aud` of a JWT: this gateway's name at the provider.")
    jwt_role_claim: str = Field(
        "tidewright_role", description="JWT claim that grants the role admin, as a string or in a list."
    )
