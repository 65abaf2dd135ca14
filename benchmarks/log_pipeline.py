"""How soon a line of the log can be searched, and whether one is lost. `python -m benchmarks.log_pipeline`

A real gateway, with a replica that answers at once, logs JSON to files. A real rsyslog ships them, as
monitoring/logs/rsyslog.conf says, to a sink with Elasticsearch's `_bulk` API, which is stopped half-way for a while.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from datetime import datetime
from pathlib import Path

import uvloop

from benchmarks.bulk_sink import BulkSink
from benchmarks.gateway import SHORT, chat
from benchmarks.gateway_load import HttpClient, open_loop
from benchmarks.gateway_parts import Row, echoes, gateway, show
from benchmarks.rsyslog import Rsyslog
from tidewright.bench.machine import free_ports
from tidewright.bench.sweep import percentile

PATIENCE = 60.0  # seconds for the last line


async def measure(seconds: float, rate: float, outage: float) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = [folder / "logs" / "gateway.log", folder / "logs" / "access.log"]
        files[0].parent.mkdir()
        sink = BulkSink(*free_ports(1))
        options = {"log_format": "json", "log_file": files[0], "access_log": files[1], "log_level": "debug"}
        with sink, Rsyslog(folder, files[0].parent, sink.port), echoes() as (echo,):
            with gateway([echo.url], **options) as running:
                client = HttpClient(running.port)
                back_at = 0.0
                for number, is_up in enumerate((True, False, True)):
                    if is_up and number:
                        sink.start()
                        back_at = time.time()
                    elif not is_up:
                        sink.stop()
                    await open_loop(
                        lambda: client.generate(chat(SHORT), False), rate, seconds if is_up else outage, number
                    )
                client.close()
            ended = time.monotonic()
            written = [line for file in files for line in file.read_text().splitlines()]
            while len(sink.documents) < len(written) and time.monotonic() - ended < PATIENCE:
                await asyncio.sleep(0.05)
        times = dict(sink.documents.values())
        lost = sum(line not in times for line in written)
        logged = {line: _written_at(line) for line in times}
        began = min(logged.values())
        quiet = [times[line] - at for line, at in logged.items() if at < began + seconds - 1]
        late = max(times[line] for line, at in logged.items() if at < back_at) - back_at
        rows = [
            Row("seconds until a line is visible, p50", f"{percentile(quiet, 50):.2f} s"),
            Row("  p99", f"{percentile(quiet, 99):.2f} s"),
            Row("  most", f"{max(quiet):.2f} s", "< 5 s", max(quiet) < 5),
            Row(f"lines lost of {len(written)}, the sink away for {outage:g} s", str(lost), "0", lost == 0),
            Row("lines sent twice, and stored once", str(sink.num_received - len(sink.documents))),
        ]
        show(
            f"log pipeline, {rate:g} requests/s",
            rows,
            [f"lines of the outage were there {late:.1f} s after the sink was back"],
        )


def _written_at(line: str) -> float:
    return datetime.fromisoformat(json.loads(line)["time"].replace("Z", "+00:00")).timestamp()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10, help="before the sink is stopped, and after")
    parser.add_argument("--outage", type=float, default=5, help="seconds")
    parser.add_argument("--rate", type=float, default=100, help="requests a second")
    options = parser.parse_args()
    uvloop.run(measure(options.seconds, options.rate, options.outage))


if __name__ == "__main__":
    main()
