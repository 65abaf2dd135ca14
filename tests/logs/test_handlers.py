"""logs/handlers.py: rotation, a full disk, several processes; setup.py: levels, and what Python prints itself."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tidewright import logs
from tidewright.logs import handlers
from tidewright.logs.records import JsonFormatter

FULL = "/dev/full"
log = logging.getLogger("tidewright.tests")


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers that the listener of dropped lines got."""
    monkeypatch.setattr(handlers, "_dropped", 0)
    monkeypatch.setattr(handlers, "_listener", None)
    found: list[int] = []
    logs.on_dropped(found.append)
    return found


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, with `log`."""
    begin = "import logging, sys, threading, warnings\nfrom tidewright import logs\n"
    begin += "log = logging.getLogger('tidewright.x')\n"
    return subprocess.run(
        [sys.executable, "-c", begin + script],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )


def test_a_file_that_is_moved_away_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "it.log"
    handler = logs.open_handler(str(path))
    handler.write_line("one")
    path.rename(tmp_path / "it.log.1")
    handler.write_line("two")
    handler.close()
    assert (path.read_text(), (tmp_path / "it.log.1").read_text()) == ("two\n", "one\n")


def test_one_that_can_not_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(logs.LogFileError, match=r"^access_log: can't write .*/none/it: No such file or directory$"):
        logs.open_handler(str(tmp_path / "none" / "it"), "access_log")
    with pytest.raises(logs.LogFileError, match="Is a directory"):
        logs.open_handler(str(tmp_path))


def test_a_full_disk_is_complained_of_once_and_lines_are_counted(
    lost: list[int], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "it.log"
    path.symlink_to(FULL)
    handler = logs.open_handler(str(path))
    handler.setFormatter(JsonFormatter("gateway"))
    for number in range(1000):
        handler.write_line(f"line {number}")
    assert lost == [1] * 1000
    complaint = capfd.readouterr().err
    assert complaint.count("\n") == 1
    assert "No space left on device" in complaint
    path.unlink()  # there is room again
    handler.write_line("well")
    handler.close()
    first, second = path.read_text().splitlines()
    assert first == "well"
    assert (json.loads(second)["event"], json.loads(second)["lines"]) == ("log_lines_dropped", 1000)


def test_who_listens_late_hears_of_those_lost_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handlers, "_dropped", 7)
    monkeypatch.setattr(handlers, "_listener", None)
    found: list[int] = []
    logs.on_dropped(found.append)
    assert found == [7]


def test_a_line_that_was_cut_does_not_spoil_the_next(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, write, room = tmp_path / "it.log", os.write, [5]

    def little_room(fd: int, data: bytes) -> int:
        if fd == 2:
            return len(data)
        if not room[0]:
            raise OSError(28, "No space left on device")
        size = min(room[0], len(data))
        room[0] -= size
        return write(fd, data[:size])

    handler = logs.open_handler(str(path))
    monkeypatch.setattr(handlers.os, "write", little_room)
    handler.write_line("0123456789")
    room[0] = 100
    handler.write_line("whole")
    handler.close()
    assert path.read_text() == "01234\nwhole\n"


def test_lines_of_several_processes_do_not_mix(tmp_path: Path) -> None:
    script = (
        "import sys; from tidewright import logs\n"
        "handler = logs.open_handler(sys.argv[1])\n"
        "for number in range(300): handler.write_line(sys.argv[2] * (1 + 97 * number % 20000))"
    )
    path = tmp_path / "it.log"
    jobs = [subprocess.Popen([sys.executable, "-c", script, str(path), letter]) for letter in "abcd"]
    assert [job.wait(60) for job in jobs] == [0] * 4
    lines = path.read_text().splitlines()
    assert len(lines) == 1200
    assert all(len(set(line)) == 1 for line in lines)


@pytest.mark.parametrize(("level", "shown"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_levels_are_ours_and_libraries_keep_their_details(level: str, shown: int) -> None:
    script = (
        f"logs.set_up('gateway', 'json', {level!r})\n"
        "for name in ('tidewright.a', 'tidewright_gateway.a', 'websockets.server', 'httpx', 'uvicorn.error'):\n"
        "    it = logging.getLogger(name); it.debug('x'); it.info('x'); it.warning('x'); it.error('x')\n"
        "logging.getLogger('uvicorn.error').warning('Invalid HTTP request received.')"
    )
    lines = run(script).stderr.splitlines()
    of_libraries = 3 * min(shown, 2)
    assert len(lines) == 2 * shown + of_libraries
    assert all(json.loads(line)["message"] == "x" for line in lines)


def test_in_json_all_that_python_prints_itself_is_a_line_of_json() -> None:
    script = (
        "logs.set_up('gateway', 'json')\n"
        "warnings.warn('take care')\n"
        "thread = threading.Thread(target=lambda: 1 / 0, name='worker'); thread.start(); thread.join()\n"
        "raise ValueError('the\\nend')"
    )
    ended = run(script)
    found = [json.loads(line) for line in ended.stderr.splitlines()]
    assert ended.returncode == 1
    assert [one["level"] for one in found] == ["warning", "critical", "critical"]
    assert "take care" in found[0]["message"]
    assert found[1]["message"] == "the thread worker ends: division by zero"
    assert found[2]["exception"].endswith("ValueError: the\nend")


@pytest.mark.parametrize("form", ["json", "text", "unknown"])
def test_a_child_does_as_its_parent_says(form: str) -> None:
    script = "logs.set_up_child('rank1'); log.info('no'); log.warning('yes'); logs.rename('engine'); log.error('now')"
    ended = run(script, TIDEWRIGHT_LOG_FORMAT=form, TIDEWRIGHT_LOG_LEVEL="warning")
    first, second = ended.stderr.splitlines()
    if form == "json":
        assert [json.loads(line)["process"] for line in (first, second)] == ["rank1", "engine"]
    else:
        assert " WARNING rank1[" in first
        assert " ERROR engine[" in second
