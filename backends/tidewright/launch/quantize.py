"""What `tidewright quantize` does around the quantization: the folder, the lock, space, and interrupted runs."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
from rich.console import Console

from tidewright.cache import EMBEDDED_MODEL, MANIFEST, cache_dir, slug
from tidewright.launch.errors import LaunchError
from tidewright.launch.folders import locked, put_in_place, write_json
from tidewright.launch.model_sources import SMALL_FILES
from tidewright.launch.prepare import Manifest, prepare
from tidewright.launch.progress import progress_bar
from tidewright.launch.space import check_space, full, is_full
from tidewright.models.config import ModelConfigError

if TYPE_CHECKING:
    from tidewright.quantization.affine import Scheme
    from tidewright.quantization.quantize_model import Recipe

SCHEMES = ("int8", "w8a8", "int4-g32", "int4-g64", "int4-g128", "fp8")
FORMAT_VERSION = 2  # to be raised whenever the same order would be carried out differently
CALIBRATION_TOKENS = 8192
MAX_CALIBRATION_BYTES = 16 << 20
_BUILT_IN_TEXT = Path(__file__).parent.parent / "quantization" / "texts" / "alice.txt"
_STATE, _MADE = "quantizing.json", "quantized.json"
_OTHER_FILES = 16 << 20  # bytes: the tokenizer's files and headers take so much at most, about
_ELSEWHERE = "choose another folder with --out"


class QuantizeError(LaunchError):
    """A model can't be quantized."""


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for: only a run for the same continues what another has begun."""

    format_version: int
    model: str
    fingerprint: str
    scheme: str
    head: str
    method: str
    calibration_sha256: str


def quantized_path(model: str, scheme: str) -> Path:
    """Where `tidewright quantize MODEL --scheme SCHEME` puts it, unless told."""
    return cache_dir() / "quantized" / f"{slug(model)}-{scheme}"


def quantize(
    model: str,
    scheme_name: str,
    out: Path | None,
    console: Console,
    method: Literal["rtn", "gptq"] = "rtn",
    head: Literal["int8", "same", "keep"] = "int8",
    calibration: Path | None = None,
    force: bool = False,
) -> Path:
    """Make a quantized copy of `model` and return its folder. What is there already costs nothing.

    `force`: made anew all the same, also in place of another quantized model.

    Raises:
        LaunchError: says what to change.
    """
    if method == "gptq" and scheme_name == "fp8":
        raise QuantizeError("GPTQ is for integers; fp8 is rounded to nearest: leave out --method gptq")
    if calibration and method != "gptq":
        raise QuantizeError("--calibration is for --method gptq: rounding to nearest reads no text")
    text = _read_text(calibration or _BUILT_IN_TEXT) if method == "gptq" else ""
    source, target = prepare(model, console), (out or quantized_path(model, scheme_name)).absolute()
    is_other = target.exists() and not (target / _MADE).is_file() and any(_listed(target))
    if target.resolve() == source.resolve() or is_other:
        raise QuantizeError(f"{target} is there and is not a quantized model; remove it, or choose another --out")
    order = _order(model, source, scheme_name, head, method, text)
    try:
        with locked(target, console):
            made = _read_order(target / _MADE)
            if not force and made == order and (target / MANIFEST).is_file():
                return target
            if not force and (target / _MADE).is_file() and not (made and _is_same(made, order)):
                what = _told(made, order) if made else "another version's"
                raise QuantizeError(f"{target} holds {what}; --force replaces it, or choose another --out")
            _make(source, target, order, text, console)
    except OSError as error:
        if is_full(error):
            again = "what is finished stays, and the same command continues"
            raise QuantizeError(full(f"can't quantize {model}", target.parent, f"{_ELSEWHERE}; {again}")) from error
        raise QuantizeError(f"can't write to {target}: {error}; {_ELSEWHERE}") from error
    return target


def _make(source: Path, target: Path, order: Order, text: str, console: Console) -> None:
    partial = target.with_name(f".{target.name}.quantizing")
    if not _continues(partial, order):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / _STATE).write_bytes(msgspec.json.encode(order))
    # Not at the top: they load torch.
    from tidewright.devices.cpu.step_threads import set_threads
    from tidewright.quantization.quantize_model import QuantizationRun

    set_threads(0, sharers=1)
    with _refused(order, partial):
        run = QuantizationRun(source, partial, _recipe(order, source, text))
        needed = run.bytes_needed() + _OTHER_FILES - _size(partial)
    finished = len(list(partial.glob("*.safetensors")))
    try:
        check_space(partial, needed, "the quantized model", _ELSEWHERE, QuantizeError)
    except QuantizeError:
        if not finished:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if finished:
        console.print(f"Continuing an earlier run; files finished: {finished}")
    with _refused(order, partial):
        with progress_bar(console, f"Quantizing to {order.scheme} by {order.method}") as on_progress:
            run.run(on_progress)
    for name in SMALL_FILES:
        if name != "config.json" and (source / name).is_file():
            shutil.copyfile(source / name, partial / name)
    manifest = Manifest(source=order.model, created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    write_json(partial / MANIFEST, manifest)
    (partial / _MADE).write_bytes(msgspec.json.encode(order))
    (partial / _STATE).unlink(missing_ok=True)
    put_in_place(partial, target)


@contextmanager
def _refused(order: Order, partial: Path) -> Iterator[None]:
    """Names the model that can't be quantized, and leaves nothing of it."""
    from tidewright.quantization.affine import QuantizationError
    from tidewright.quantization.checkpoint import CheckpointError

    try:
        yield
    except (QuantizationError, CheckpointError, ModelConfigError, QuantizeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise QuantizeError(f"can't quantize {order.model}: {error}") from error


def _recipe(order: Order, source: Path, text: str) -> Recipe:
    from tidewright.quantization.affine import SCHEMES as BY_NAME
    from tidewright.quantization.quantize_model import Recipe

    scheme = BY_NAME[order.scheme]
    heads: dict[str, Scheme | None] = {"keep": None, "same": scheme, "int8": _in_eight_bits(scheme)}
    return Recipe(scheme, heads[order.head], tuple(_token_ids(source, text)) if text else ())


def _in_eight_bits(scheme: Scheme) -> Scheme:
    from tidewright.quantization.affine import SCHEMES as BY_NAME

    return scheme if scheme.weight_bits == 8 else BY_NAME["int8"]


def _token_ids(source: Path, text: str) -> list[int]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.no_truncation()
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids[:CALIBRATION_TOKENS]
    if len(ids) < 2:
        raise QuantizeError("the calibration text has no two tokens; some thousand are good")
    return ids


def _read_text(file: Path) -> str:
    try:
        if file.stat().st_size > MAX_CALIBRATION_BYTES:
            raise QuantizeError(f"{file} is larger than {MAX_CALIBRATION_BYTES >> 20} MiB; a part of it does")
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise QuantizeError(f"can't read the calibration text {file}: {error}") from error
    if not text.strip():
        raise QuantizeError(f"the calibration text {file} is empty")
    return text


def _order(model: str, source: Path, scheme: str, head: str, method: str, text: str) -> Order:
    from tidewright.distributed.fingerprint import model_fingerprint

    return Order(
        format_version=FORMAT_VERSION,
        model=model if model == EMBEDDED_MODEL or not Path(model).exists() else str(Path(model).resolve()),
        fingerprint=model_fingerprint(source),
        scheme=scheme,
        head=head,
        method=method,
        calibration_sha256=hashlib.sha256(text.encode()).hexdigest() if text else "",
    )


def _is_same(made: Order, order: Order) -> bool:
    """But for the model's own changes and ours, after which it is to be made anew."""
    return made == msgspec.structs.replace(order, format_version=made.format_version, fingerprint=made.fingerprint)


def _told(made: Order, order: Order) -> str:
    is_other_text = made.method == order.method and made.calibration_sha256 != order.calibration_sha256
    text = ", with another calibration text" if is_other_text else ""
    return f"{made.model} in {made.scheme} by {made.method}, head {made.head}{text}"


def _continues(partial: Path, order: Order) -> bool:
    """Also if only its last step is missing."""
    return order in (_read_order(partial / _STATE), _read_order(partial / _MADE))


def _read_order(file: Path) -> Order | None:
    try:
        return msgspec.json.decode(file.read_bytes(), type=Order)
    except (OSError, msgspec.MsgspecError):
        return None


def _listed(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else [folder]


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
