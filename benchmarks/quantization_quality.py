"""The table of docs/quantization.md: every scheme of a model beside its source, measured in one run.

python -m benchmarks.quantization_quality --schemes int8,w8a8,int4-g32,int4-g64:gptq
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from tidewright.cache import EMBEDDED_MODEL
from tidewright.devices.cpu.step_threads import set_threads
from tidewright.launch.prepare import prepare
from tidewright.launch.progress import progress_bar
from tidewright.launch.quantize import quantize, quantized_path
from tidewright.launch.quantize_report import print_reports
from tidewright.quantization.quality import Extent
from tidewright.quantization.report import make_reports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument(
        "--schemes",
        default="int8,w8a8,int4-g32,int4-g64,int4-g64:gptq,fp8",
        help="SCHEME[:METHOD], or a quantized model, …",
    )
    parser.add_argument("--tokens", type=int, default=Extent().tokens, help="of the text, at most")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    options = parser.parse_args()
    console, folders = Console(width=140), {}
    for name in options.schemes.split(","):
        if Path(name).exists():
            folders[Path(name).name] = prepare(name, console)
            continue
        scheme, _, method = name.partition(":")
        chosen: dict[str, Any] = {
            "method": method or "rtn",
            "out": quantized_path(options.model, name.replace(":", "-")),
        }
        folders[name] = quantize(options.model, scheme, console=console, **chosen)
    set_threads(0, sharers=1)
    with progress_bar(console, "Reading and answering") as on_progress:
        extent = Extent(tokens=options.tokens)
        reports = make_reports(prepare(options.model, console), folders, on_progress, extent)
    print_reports(list(reports.values()), console)
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(reports)) + b"\n")


if __name__ == "__main__":
    main()
