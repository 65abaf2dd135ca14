"""Words of error messages."""

from __future__ import annotations

import pytest

from tidewright.errors import seconds_text


@pytest.mark.parametrize(
    ("timeout", "text"),
    [(0.00922091, "0.00922"), (0.05, "0.05"), (2.5, "2.5"), (50, "50"), (1234.5678, "1235"), (86400, "86400")],
)
def test_seconds_have_three_digits_and_no_exponent(timeout: float, text: str) -> None:
    assert seconds_text(timeout) == text
