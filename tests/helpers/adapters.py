"""Random LoRA adapters made and saved by PEFT, which is also the oracle of what they mean."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save_adapter(
    model: transformers.PreTrainedModel, folder: Path, seed: int = 0, scale: float = 1.0, **options: Any
) -> peft.PeftModel:
    """An adapter that changes what the model says, and PEFT's model with it; `scale` is of its second matrices."""
    values = {"r": 4, "lora_alpha": 8, "target_modules": ALL, "task_type": "CAUSAL_LM"} | options
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(init_lora_weights=False, **values)).eval()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.mul_(scale)
    adapted.save_pretrained(folder)
    return adapted
