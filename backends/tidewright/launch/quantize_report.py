"""What `tidewright quantize --report` shows, and leaves as report.json in the quantized folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from tidewright.launch.folders import write_json
from tidewright.launch.prepare import prepare
from tidewright.launch.progress import progress_bar
from tidewright.launch.quantize import QuantizeError

if TYPE_CHECKING:
    from tidewright.quantization.quality import Extent
    from tidewright.quantization.report import Report


def report(model: str, folder: Path, scheme: str, console: Console, extent: Extent | None = None) -> Report:
    """Compares `folder` with the model that it was made from. Raises LaunchError."""
    # Not at the top: they load torch.
    from tidewright.devices.cpu.step_threads import set_threads
    from tidewright.quantization.report import REPORT, make_reports

    set_threads(0, sharers=1)
    try:
        with progress_bar(console, f"Comparing {scheme} with its source") as on_progress:
            (made,) = make_reports(prepare(model, console), {scheme: folder}, on_progress, extent).values()
    except ValueError as error:  # of the model runner
        raise QuantizeError(str(error)) from error
    write_json(folder / REPORT, made)
    return made


def print_reports(reports: Sequence[Report], console: Console) -> None:
    """All of one source, which has the first column."""
    first = reports[0]
    table = Table("", first.dtype, *(made.scheme for made in reports), box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    qualities = [made.quality for made in reports]
    source = first.quality
    table.add_row(
        "weights", *(f"{count / 1e6:,.0f} MB" for count in (first.source_bytes, *(one.bytes for one in reports)))
    )
    loads = first.source_load_seconds, *(made.load_seconds for made in reports)
    table.add_row("load", *(f"{seconds:.1f} s" for seconds in loads))
    table.add_row("perplexity", f"{source.source_perplexity:.2f}", *(f"{one.perplexity:.2f}" for one in qualities))
    table.add_row("", "", *(f"{one.perplexity / one.source_perplexity - 1:+.1%}" for one in qualities))
    table.add_row("KL divergence", "", *(f"{one.divergence:.4f}" for one in qualities))
    table.add_row("same next token", "", *(f"{one.same_next_token:.1%}" for one in qualities))
    table.add_row("same answer", "", *(f"{one.same_answer:.1f} tokens" for one in qualities))
    choices = source.source_right_choices, *(one.right_choices for one in qualities)
    table.add_row("right choices", *(f"{share:.0%}" for share in choices))
    prompts = source.source_prompt_speed, *(one.prompt_speed for one in qualities)
    table.add_row("prompt", *(f"{speed:,.0f} tokens/s" for speed in prompts))
    decodes = source.source_decode_speed, *(one.decode_speed for one in qualities)
    table.add_row("decode", *(f"{speed:,.1f} tokens/s" for speed in decodes))
    console.print(table)
