"""aiperf and our own test, one after the other, and a page with both."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from loadtests import aiperf, driver, figures, preflight
from loadtests import report as reports
from loadtests.driver import Fleet
from loadtests.options import Options
from loadtests.session import target
from tidewright.cache import EMBEDDED_MODEL
from tidewright.launch.prepare import prepare


def run(options: Options, triton: str, tokenizer: str, folder: Path) -> list[dict[str, Any]]:
    """The rows of the page. With `triton` aiperf measures Triton's HTTP, and there is nothing of ours beside it.

    Raises:
        TargetError, ServerError, LoadError, AiperfError: one of the two could not run.
    """
    tokenizer = tokenizer or str(prepare(EMBEDDED_MODEL))
    assert options.fixed
    prompt, answer = options.fixed
    plan = aiperf.Plan(
        url=f"http://{triton}",
        model=options.model or Path(tokenizer).name,
        tokenizer=tokenizer,
        requests=options.requests,
        concurrency=options.users,
        prompt=prompt,
        answer=answer,
        key=options.keys[0],
        triton_model="decoder",
    )
    if triton:
        rows = aiperf.rows(None, aiperf.run(plan))
    else:
        with target(options) as (options, _), tempfile.TemporaryDirectory() as scratch:
            options = preflight.check(options)
            theirs = aiperf.run(replace(plan, url=options.url, model=options.model, triton_model=""))
            print("Now our own test.", file=sys.stderr)
            result = driver.run(options, Fleet(), Path(scratch))
        rows = aiperf.rows(figures.summary(result.samples, result.ended - result.began), theirs)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "aiperf.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    page = folder / "aiperf.html"
    page.write_text(reports.render("aiperf.html.j2", {}, rows=rows, plan=plan), encoding="utf-8")
    for row in rows:
        shown = (reports.figure(row[which]) for which in ("ours", "aiperf", "ratio"))
        print("{:16} ours {:>9}  aiperf {:>9}  ratio {:>6}".format(row["name"], *shown))
    print(f"Report: {page}", file=sys.stderr)
    return rows
