"""The Triton models of a model beside the first, made from those of the first: the same files under other names."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from tidewright.served_models import PARAMETER, chain_of

# generate_NAME has no failsafe between tokenizer and decoder: fallback and failsafe are the first model's alone.
_ORIGINALS = ("tokenizer", "decoder", "generate_direct")
_NAMES = re.compile(r'^(\s*(?:model_)?name: )"(\w+)"', re.MULTILINE)


def write_chain(name: str, repositories: Sequence[Path], target: Path) -> None:
    """Writes the folders of the model `name` into the repository `target`. `repositories`: where the originals are."""
    names = dict(zip(_ORIGINALS, chain_of(name), strict=True))
    for original, made in names.items():
        source = next(folder / original for folder in repositories if (folder / original).is_dir())
        folder = target / made
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("__pycache__", ".gitkeep"))
        (folder / "1").mkdir(exist_ok=True)
        config = folder / "config.pbtxt"
        text = _NAMES.sub(lambda found: f'{found[1]}"{names.get(found[2], found[2])}"', config.read_text("utf-8"))
        config.write_text(f'{text}parameters {{ key: "{PARAMETER}" value {{ string_value: "{name}" }} }}\n', "utf-8")
