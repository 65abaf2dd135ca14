"""Who may call: API keys and JWTs. Not for what a caller may use up."""

from tidewright_gateway.auth.authenticator import Authenticator, credential_of, require_admin
from tidewright_gateway.auth.errors import AuthSetupError

__all__ = ["AuthSetupError", "Authenticator", "credential_of", "require_admin"]
