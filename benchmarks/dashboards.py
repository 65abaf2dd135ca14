"""How long a whole dashboard takes with a day of data, and what it looks like. `python -m benchmarks.dashboards`.

A real Prometheus gets 24 h of synthetic series of all metrics in the catalogue: one gateway and three Tritons, a day's
rhythm, some noise, an engine's restart. Then each dashboard's queries are asked as Grafana asks them for the last 24 h:
a point for each pixel of a wide panel, six queries at a time, as browsers do. With --pictures, the answers are drawn
into the pictures of docs/monitoring.md. Needs Debian's `prometheus` and some minutes, most of them for making the data.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from benchmarks.dashboard_pictures import draw
from benchmarks.dashboard_series import write_openmetrics
from tidewright.bench.machine import free_ports

MONITORING = Path(__file__).resolve().parents[1] / "monitoring"
sys.path.insert(0, str(MONITORING))

from dashboard_panels import DASHBOARDS  # noqa: E402
from dashboard_panels.shapes import Dashboard  # noqa: E402

DAY = 86400
POINTS = 1000  # of a panel
AT_ONCE = 6  # queries
Answers = dict[str, list[dict[str, Any]]]
"""By query: Prometheus' series, each with `metric` and `values`."""


@contextmanager
def prometheus(folder: Path) -> Iterator[str]:
    """Its address, with the data in `folder`."""
    (port,) = free_ports(1)
    config = folder / "empty.yml"
    config.write_text("{}\n")
    command = [
        "prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}", "--log.level=error", "--storage.tsdb.retention.time=10d",
    ]  # fmt: skip
    with subprocess.Popen(command) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            while True:
                try:
                    if httpx.get(f"{url}/-/ready", trust_env=False).status_code == 200:
                        break
                except httpx.TransportError:
                    if process.poll() is not None:
                        raise SystemExit("prometheus did not start") from None
                time.sleep(0.1)
            yield url
        finally:
            process.terminate()


def make_data(folder: Path, end: int, scrape: int) -> int:
    """Returns the number of series, with those that the rules record."""
    file = folder / "series.txt"
    count = write_openmetrics(file, end - DAY, end, scrape)
    data = folder / "data"
    subprocess.run(["promtool", "tsdb", "create-blocks-from", "openmetrics", "-q", file, data], check=True)
    file.unlink()
    rules = MONITORING / "rules" / "recording.yml"
    for _ in range(2):  # some rules need what others have recorded
        with prometheus(folder) as url:
            command = ["promtool", "tsdb", "create-blocks-from", "rules", f"--start={end - DAY}", f"--end={end}"]
            command += [f"--url={url}", f"--eval-interval={scrape}s", f"--output-dir={folder / 'recorded'}", str(rules)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for block in (folder / "recorded").iterdir():
            block.rename(data / block.name)
    return count


def ask(client: httpx.Client, expr: str, end: int) -> list[dict[str, Any]]:
    parameters = {"query": expr, "start": end - DAY, "end": end, "step": DAY // POINTS}
    answer = client.post("/api/v1/query_range", data=parameters).json()
    if answer["status"] != "success":
        raise SystemExit(f"{expr}: {answer['error']}")
    found: list[dict[str, Any]] = answer["data"]["result"]
    return found


def refresh(url: str, dashboard: Dashboard, end: int) -> tuple[float, Answers]:
    """Seconds, and what the queries got."""
    queries = [query for row in dashboard.rows for panel in row.panels for query in panel.queries]
    exprs = list(dict.fromkeys(query.expr.replace("$instance", ".*") for query in queries))
    with httpx.Client(base_url=url, timeout=300, trust_env=False) as client, ThreadPoolExecutor(AT_ONCE) as pool:
        began = time.monotonic()
        answers = list(pool.map(lambda expr: ask(client, expr, end), exprs))
        return time.monotonic() - began, dict(zip(exprs, answers, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scrape", type=int, default=15, help="seconds between two samples of a series")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="draw each dashboard there")
    options = parser.parse_args()
    end = int(time.time()) // 7200 * 7200
    with TemporaryDirectory() as name:
        folder = Path(name)
        began = time.monotonic()
        count = make_data(folder, end, options.scrape)
        size = sum(file.stat().st_size for file in (folder / "data").rglob("*") if file.is_file())
        print(f"{count} series of 24 h, a sample every {options.scrape} s: {size / 2**20:.0f} MiB", end=", ")
        print(f"made in {time.monotonic() - began:.0f} s")
        with prometheus(folder) as url:
            for dashboard in DASHBOARDS:
                rounds = [refresh(url, dashboard, end) for _ in range(options.rounds)]
                answers = rounds[-1][1]
                empty = [expr for expr, found in answers.items() if not found]
                seconds = [one for one, _ in rounds]
                print(
                    f"{dashboard.name:10} {len(answers):3} queries, {len(empty)} empty: "
                    f"{statistics.median(seconds):.2f} s (first {seconds[0]:.2f} s)"
                )
                if options.pictures and len(empty) < len(answers):
                    draw(dashboard, answers, options.pictures / f"dashboard-{dashboard.name}.webp")


if __name__ == "__main__":
    main()
