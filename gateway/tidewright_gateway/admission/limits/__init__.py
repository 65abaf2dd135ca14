"""How much a caller may use: requests, concurrency and tokens, reserved before the work and settled after it."""

from tidewright_gateway.admission.limits.estimates import Estimates
from tidewright_gateway.admission.limits.limiter import Limiter, Reservation, make_limiter
from tidewright_gateway.admission.limits.shared import LimitServer
from tidewright_gateway.admission.limits.store import Subject
from tidewright_gateway.admission.limits.subjects import subjects_of

__all__ = ["Estimates", "LimitServer", "Limiter", "Reservation", "Subject", "make_limiter", "subjects_of"]
