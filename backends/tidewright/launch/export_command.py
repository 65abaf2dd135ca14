"""`tidewright export-onnx`, and the fallback that `tidewright prepare` makes in the same way."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.table import Table

from tidewright.cache import EMBEDDED_MODEL, fallback_path
from tidewright.launch.errors import LaunchError
from tidewright.launch.export import export
from tidewright.launch.prepare import prepare
from tidewright.onnx_export.manifest import MANIFEST, PRECISIONS, REPORT, Report, tokenizer_sha256


@click.command()
@click.argument("model", default=EMBEDDED_MODEL)
@click.option(
    "--precision", type=click.Choice([*PRECISIONS, "both"]), default="int8", show_default=True, help="Of the weights."
)
@click.option("--output", type=click.Path(path_type=Path), help="Folder to make, instead of one in the cache.")
@click.option("--force", is_flag=True, help="Make it anew even if it is ready.")
def export_onnx(model: str, precision: str, output: Path | None, force: bool) -> None:
    """Export MODEL to ONNX for onnxruntime, and print the folder.

    MODEL is what `tidewright prepare` takes, and is prepared if it isn't. The export is compared with the source
    model on a short text: perplexity, share of equal next tokens, and how long greedy answers stay the same.
    What is ready already costs nothing.

    \\b
    Examples:
      tidewright export-onnx
      tidewright export-onnx ./my-model --precision both --output ./my-model-onnx
    """
    console = Console(stderr=True)
    target = (output or fallback_path(model)).absolute()
    try:
        folder = prepare(model, console)
        _export(folder, target, PRECISIONS if precision == "both" else (precision,), console, force)
    except LaunchError as error:
        raise click.ClickException(str(error)) from None
    click.echo(target)


def is_export(folder: Path) -> bool:
    """Whether it was meant to be one: whether it is complete is for the model to say."""
    return (folder / MANIFEST).is_file()


def prepare_fallback(model: str, fallback_model: str, console: Console, force: bool) -> Path:
    """The folder of `fallback_model`, exported to be the fallback of `model`. Both are names as `prepare` takes them.

    Raises PrepareError or ExportError.
    """
    main, folder = prepare(model, console), prepare(fallback_model, console)
    if tokenizer_sha256(main) != tokenizer_sha256(folder):
        console.print(
            f"[yellow]{fallback_model} has another tokenizer than {model}:[/] it gives whole answers from text or "
            "messages, but does not go on with an answer that was begun",
            highlight=False,
            soft_wrap=True,
        )
    target = fallback_path(fallback_model)
    _export(folder, target, ("int8",), console, force)
    return target


def _export(folder: Path, target: Path, precisions: tuple[str, ...], console: Console, force: bool) -> None:
    if export(folder, target, precisions, console, force):
        _print_report(target, console)
    else:
        console.print(f"{target} is up to date", highlight=False, soft_wrap=True)


def _print_report(target: Path, console: Console) -> None:
    report = msgspec.json.decode((target / REPORT).read_bytes(), type=Report)
    prefix = f"same tokens of {report.answer_tokens}"
    table = Table("", "size", "perplexity", "same next token", prefix, box=None, pad_edge=False)
    table.add_row("source", "", f"{report.source_perplexity:.2f}", "", "")
    for name, model in report.models.items():
        size, same = f"{model.bytes / 1e6:,.1f} MB", f"{model.same_next_token:.1%}"
        table.add_row(name, size, f"{model.perplexity:.2f}", same, f"{model.common_prefix:.1f}")
    console.print(table)
