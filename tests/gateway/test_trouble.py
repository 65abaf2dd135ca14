"""A trouble is logged when it begins, when it changes, and when it is over."""

from __future__ import annotations

import logging

import pytest

from tidewright_gateway.trouble import Trouble


def test_each_change_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    trouble = Trouble(logging.getLogger("of the test"), over="all is well again", effect="waiting: ")
    for text in ("", "gone", "gone", "refuses", "", "", "gone"):
        trouble.note(text)
        assert trouble.text == text
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("ERROR", "waiting: gone"),
        ("ERROR", "waiting: refuses"),
        ("INFO", "all is well again"),
        ("ERROR", "waiting: gone"),
    ]
