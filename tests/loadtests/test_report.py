"""The written report: a page with pictures that needs nothing beside it, figures that are read again, comparisons."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from helpers.load_tests import load_test
from loadtests import comparison, figures, report
from loadtests.charts import PICTURES, draw
from loadtests.options import Options
from loadtests.resources import Point
from loadtests.resources import figures as process_figures
from loadtests.samples import Sample

OPTIONS = Options(shape="ramp", users=8, duration=80.0, model="m", keys=("secret-1", "secret-2"))
MACHINE = {"cpu": "test", "cores": 2, "python": "3.11"}


def made(slowness: float = 1.0, errors: bool = True, **more: Any) -> dict[str, Any]:
    """Of a run of which each second has one request."""
    samples = [
        Sample(
            at=float(second),
            protocol="http",
            kind="chat",
            tenant="tenant 1",
            prompt_tokens=20,
            output_tokens=11,
            first=0.1 * slowness * (1 + second % 3),
            last=0.5 * slowness * (1 + second % 3),
            longest_gap=0.1,
            error="<script>alert(1)</script>" if errors and second % 20 == 7 else "",
        )
        for second in range(80)
    ]
    series = {("server: engine", 7): [Point(float(at), at / 2, 100.0 + at, 9) for at in range(80)]}
    processes = process_figures(series, 0.0, 10.0)
    values = {"machine": MACHINE, "processes": processes, "interrupted": False} | more
    return figures.report(samples, OPTIONS, 0.0, 80.0, **values)


def pictures_of(page: str) -> dict[str, np.ndarray]:
    found = re.findall(r'<img alt="([^"]+)" src="data:image/png;base64,([^"]+)"', page)
    return {title: imread(io.BytesIO(base64.b64decode(data))) for title, data in found}


def test_the_page_is_whole_and_its_pictures_show_something(tmp_path: Path) -> None:
    page, data = report.write(made(), tmp_path)
    text = page.read_text()
    pictures = pictures_of(text)
    assert pictures.keys() == PICTURES.keys()
    for title, picture in pictures.items():
        height, width, _ = picture.shape
        assert min(height, width) > 200
        inked = (picture[..., :3].min(axis=2) < 0.9).mean()
        assert inked > 0.02, title  # more than axes
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "secret-" not in text + data.read_text()
    assert report.read(data) == json.loads(json.dumps(made()))


def test_pictures_without_figures_are_left_out() -> None:
    assert not {"Errors by kind", "Processes"} & draw(made(errors=False, processes=[])).keys()
    nothing = figures.report([], OPTIONS, 0.0, 80.0, machine=MACHINE, processes=[])
    assert draw(nothing).keys() == {"Latency and throughput over time"}
    report.render("report.html.j2", draw(nothing), report=nothing)


def test_process_figures_are_those_of_the_series() -> None:
    (one,) = made()["processes"]
    assert one["cpu_seconds"] == pytest.approx(39.5)
    assert one["cpu"][1:] == pytest.approx([0.5] * (len(one["cpu"]) - 1))
    assert one["mib_per_minute"] == pytest.approx(60.0)
    assert one["descriptors_per_minute"] == pytest.approx(0.0)


def test_a_comparison_says_what_is_better() -> None:
    old, new = made(), made(slowness=2.0)
    rows = {row.name: row for row in comparison.rows(old, new)}
    assert rows["TTFT p50, ms"].ratio == pytest.approx(2.0)
    assert rows["TTFT p50, ms"].better is False
    assert rows["whole request p99, ms"].old == old["summary"]["e2e_ms"]["p99"]
    assert rows["whole request p99, ms"].new == new["summary"]["e2e_ms"]["p99"]
    assert rows["requests/s"].better is None
    assert rows["longest pause p50, ms"].better is None
    back = {row.name: row for row in comparison.rows(new, old)}
    assert back["TPOT p90, ms"].better is True
    assert comparison.differences(old, new) == []
    other = {**new, "options": {**new["options"], "seed": 5}, "machine": {}}
    assert len(comparison.differences(old, other)) == 2


@pytest.mark.parametrize("option", ["fixed", "model", "requests", "cancel_share", "keys", "users"])
def test_a_comparison_of_different_tests_says_so(option: str) -> None:
    old = made()
    new = {**old, "options": {**old["options"], option: "another"}}
    (line,) = comparison.differences(old, new)
    assert line.startswith(f"not the same test: {option} was ")
    elsewhere = {**old["options"], "url": "http://there", "grpc": "there:1"}
    assert comparison.differences(old, {**old, "options": elsewhere}) == []


@pytest.mark.parametrize(
    ("old", "new", "lower_is_better", "better"),
    [
        (0, 1000, True, False),
        (1000, 0, True, True),
        (0, 0, True, None),
        (0.0, 5.0, False, True),
        (5.0, 0.0, False, False),
        (1.0, 1.05, True, None),
        (None, 1.0, True, None),
        (0, 1000, None, None),
    ],
)
def test_what_was_none_can_be_worse(old: float, new: float, lower_is_better: bool | None, better: bool | None) -> None:
    assert comparison.Row("failed", old, new, lower_is_better).better is better


def test_the_compare_command_prints_and_writes(tmp_path: Path) -> None:
    files = [tmp_path / "old", tmp_path / "new"]
    for folder, slowness in zip(files, (1.0, 2.0), strict=True):
        report.write(made(slowness), folder)
    names = [str(folder / "report.json") for folder in files]
    done = load_test(tmp_path / "out", "--compare", *names)
    assert done.status == 0, done.words
    (line,) = [line for line in done.words.splitlines() if line.startswith("TTFT p50")]
    assert line.split()[-2:] == ["2", "worse"]
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert pictures_of(page).keys() == {"Distributions"}
    assert "TTFT p50, ms" in page


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "No such file"),
        ("{", "is no JSON"),
        ("[1]", "is no report"),
        ('{"version": 1}', "is no report"),
        ('{"version": 1, "summary": {}, "cdf_ms": {}, "groups": {}}', "is no report"),
        ('{"version": 99, "summary": {}, "cdf_ms": {}, "groups": {}, "knee": {}, "options": {}}', "has version 99"),
    ],
)
def test_what_is_no_report_is_one_line(tmp_path: Path, content: str | None, why: str) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(made()))
    if content is not None:
        bad.write_text(content)
    with pytest.raises(report.ReportError, match=why):
        report.read(bad)
    report.read(good)
