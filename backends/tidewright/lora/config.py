"""adapter_config.json as Hugging Face PEFT writes it: what of it is served; the rest is refused by name. No torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG_FILE = "adapter_config.json"
_LONGEST = 2**20  # bytes of that file

# Options that change what an adapter means, and the values with which they don't. Each may be absent.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "bias": ("none",),
    "modules_to_save": (None, []),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "use_bdlora": (None, False),
    "use_qalora": (False, None),
    "arrow_config": (None,),
    # The others change the base model's weights as well.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
_MOST_NAMES = 4096  # of a list or pattern: a module has one at most, and all are compared with all modules
_SIMPLE_KEY = re.compile(r"\^?[\w.]+\$?")


class AdapterError(ValueError):
    """The adapter can't be loaded. The message says why, for whoever asked for it."""


@dataclass(frozen=True)
class AdapterConfig:
    rank: int
    alpha: float
    use_rslora: bool
    targets: tuple[str, ...]  # module names or ends of them; empty: whatever the file has
    is_complete: bool  # it has each target in all layers
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    base_model: str  # as the training called it; empty: not said

    def rank_of(self, module: str) -> int:
        """`module` as PEFT names it, without the model's wrapper."""
        return next((rank for key, rank in self.rank_pattern.items() if _matches(key, module)), self.rank)

    def scale_of(self, module: str) -> float:
        """As PEFT: alpha / r, or alpha / sqrt(r) with rank-stabilized LoRA."""
        alpha = next((alpha for key, alpha in self.alpha_pattern.items() if _matches(key, module)), self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    @property
    def highest_rank(self) -> int:
        return max((self.rank, *self.rank_pattern.values()))


def read_config(content: bytes) -> AdapterConfig:
    """Raises AdapterError."""
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{CONFIG_FILE} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{CONFIG_FILE} holds no object")
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"peft_type is {_shown(config.get('peft_type'))}; only LORA adapters are served")
    for option, allowed in _UNSUPPORTED.items():
        value = config.get(option)
        if option in config and not any(value is one or value == one for one in allowed):
            raise AdapterError(f"{option} is {_shown(value)}, which is not served")
    targets = config.get("target_modules")
    names = tuple(targets) if isinstance(targets, list) and all(isinstance(name, str) for name in targets) else ()
    if not names and not isinstance(targets, str):
        raise AdapterError(f"target_modules is {_shown(targets)}, but must be names, or a pattern")
    _check_count("target_modules", names)
    use_rslora = config.get("use_rslora") or False
    if not isinstance(use_rslora, bool):
        raise AdapterError(f"use_rslora is {_shown(use_rslora)}, but must be true or false")
    return AdapterConfig(
        rank=_rank("r", config.get("r")),
        alpha=_alpha("lora_alpha", config.get("lora_alpha")),
        use_rslora=use_rslora,
        targets=names,
        is_complete=not (config.get("layers_to_transform") or config.get("exclude_modules")),
        rank_pattern={key: _rank("rank_pattern", value) for key, value in _pattern(config, "rank_pattern").items()},
        alpha_pattern={key: _alpha("alpha_pattern", value) for key, value in _pattern(config, "alpha_pattern").items()},
        base_model=base if isinstance(base := config.get("base_model_name_or_path"), str) else "",
    )


def read_config_file(file: Path) -> bytes:
    """Raises AdapterError or OSError."""
    return read_at_most(file, _LONGEST)


def read_at_most(file: Path, most: int) -> bytes:
    """Whatever its size was a moment ago. Raises AdapterError or OSError."""
    with file.open("rb") as opened:
        content = opened.read(most + 1)
    if len(content) > most:
        raise AdapterError(f"{file.name} has more than {most} bytes")
    return content


def ends_with(module: str, name: str) -> bool:
    """Whether `name` is a module's name or the end of it, in whole parts."""
    return module == name or module.endswith(f".{name}")


def _matches(key: str, module: str) -> bool:
    """As PEFT matches a key of a pattern, of those that need no regular expression."""
    name = key.removeprefix("^").removesuffix("$")
    return module == name if key.startswith("^") else ends_with(module, name)


def _pattern(config: Mapping[str, Any], option: str) -> Mapping[str, Any]:
    pattern = config.get(option) or {}
    if not isinstance(pattern, dict):
        raise AdapterError(f"{option} is {_shown(pattern)}, but must be an object")
    _check_count(option, pattern)
    if odd := next((key for key in pattern if not _SIMPLE_KEY.fullmatch(key)), None):
        raise AdapterError(f"{option} has the regular expression {_shown(odd)}; only names of modules are served")
    return pattern


def _check_count(option: str, names: Collection[str]) -> None:
    if len(names) > _MOST_NAMES:
        raise AdapterError(f"{option} has {len(names)} entries, but {_MOST_NAMES} is the limit")


def _rank(option: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise AdapterError(f"{option} has {_shown(value)}, but a rank is a whole number from 1 on")
    return value


def _alpha(option: str, value: object) -> float:
    # An integer of hundreds of digits is no float.
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= 1e6:
        raise AdapterError(f"{option} has {_shown(value)}, but must be a number of at most a million")
    return float(value)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "…"
