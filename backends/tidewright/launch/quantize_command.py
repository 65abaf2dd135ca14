"""`tidewright quantize`: a quantized copy of a model, and what it has cost in quality."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import click
from rich.console import Console

from tidewright.cache import EMBEDDED_MODEL
from tidewright.launch.errors import LaunchError
from tidewright.launch.quantize import SCHEMES
from tidewright.launch.quantize import quantize as make_quantized

INTERRUPTED = 130  # as shells say it of SIGINT


@click.command()
@click.argument("model", default=EMBEDDED_MODEL)
@click.option("--scheme", type=click.Choice(SCHEMES), default="int8", show_default=True, help="What weights become.")
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="Folder to make, instead of one in the cache."
)
@click.option(
    "--method",
    type=click.Choice(["rtn", "gptq"]),
    default="rtn",
    show_default=True,
    help="Round to nearest, or by GPTQ, which reads a text and takes minutes: closer in 4 bits.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Text for GPTQ, like what the model will be asked; a built-in one otherwise.",
)
@click.option(
    "--head",
    type=click.Choice(["int8", "same", "keep"]),
    default="int8",
    show_default=True,
    help="Embedding and head: in 8 bits, by the same scheme as the layers, or kept as they are, as vLLM needs them.",
)
@click.option("--force", is_flag=True, help="Make it anew even if it is there, or another quantized model is.")
@click.option(
    "--report",
    is_flag=True,
    help="Then compare it with MODEL on a book, and print what it has cost: minutes.",
)
def quantize(
    model: str,
    scheme: str,
    out: Path | None,
    method: Literal["rtn", "gptq"],
    calibration: Path | None,
    head: Literal["int8", "same", "keep"],
    force: bool,
    report: bool,
) -> None:
    """Make a quantized copy of MODEL, and print its folder, which `tidewright serve --model` takes.

    MODEL is what `tidewright prepare` takes, in 16 or 32 bits. The folder is in compressed-tensors' format.
    An interrupted run continues where it stopped.

    \b
    Schemes:
      int8       8-bit weights, one scale per output: half the memory
      w8a8       the same, and activations in 8 bits, too (on a CPU int8 does so as well)
      int4-g64   4-bit weights in groups of 64 (also -g32, -g128): about a third of the memory
      fp8        8-bit floats, for GPUs

    \b
    Examples:
      tidewright quantize --scheme w8a8
      tidewright quantize --scheme int4-g64 --report
      tidewright quantize org/name --scheme int4-g64 --method gptq --out ./name-int4
      tidewright serve --model ./name-int4
    """
    console = Console(stderr=True)
    try:
        folder = make_quantized(model, scheme, out, console, method, head, calibration, force)
        if report:
            _report(model, folder, scheme, console)
    except LaunchError as error:
        raise click.ClickException(str(error)) from None
    except KeyboardInterrupt:
        console.print("Interrupted; the same command continues where this one stopped")
        sys.exit(INTERRUPTED)
    click.echo(folder)


def _report(model: str, folder: Path, scheme: str, console: Console) -> None:
    from tidewright.launch.quantize_report import print_reports, report

    try:
        print_reports([report(model, folder, scheme, console)], console)
    except LaunchError as error:
        raise click.ClickException(f"{folder} is made, but there is no report: {error}") from None
