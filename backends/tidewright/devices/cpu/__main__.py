"""`python -m tidewright.devices.cpu`: builds the CPU kernels ahead, for processors other than this one. For images."""

from __future__ import annotations

import os
from pathlib import Path

import click

from tidewright.devices.cpu.baselines import BASELINES, for_machine
from tidewright.devices.cpu.build import PREBUILT, KernelBuildError, build_ahead


@click.command()
@click.argument("baselines", nargs=-1, metavar="[BASELINE]...")
@click.option("--into", type=click.Path(path_type=Path), default=PREBUILT, help="Folder. Default: in this package.")
def main(baselines: tuple[str, ...], into: Path) -> None:
    """Build the CPU kernels for each BASELINE (all of this architecture, if none is named), with $CXX or g++.

    A server takes the fastest that its processor can run, and then needs no compiler. It looks in this package, and in
    the folder `kernels` of $TIDEWRIGHT_CACHE.
    """
    here = {baseline.name: baseline for baseline in for_machine(os.uname().machine)}
    for name in baselines:
        if name not in here:
            known = name in {baseline.name for baseline in BASELINES}
            why = "is of another architecture" if known else "is none"
            raise click.UsageError(f"{name!r} {why}; choose from {', '.join(here)}")
    for name in baselines or here:
        try:
            click.echo(build_ahead(here[name], into))
        except (KernelBuildError, OSError) as error:
            raise click.ClickException(f"{name}: {error}") from None


if __name__ == "__main__":
    main()
