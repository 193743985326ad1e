"""`tell_peft`: which of our modules PEFT adapts unless it is told."""

from __future__ import annotations

import sys

from swat_flex.hf.config import SwatModelConfig

# Llama's names of the parts that are the same → ours.
PARTS = {
    "q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out", "gate_proj": "gate", "up_proj": "up",
    "down_proj": "down",
}  # fmt: skip


def tell_peft() -> None:
    """Give PEFT, where it is imported, the default targets of our model: Llama's, by our names.

    Importing PEFT takes seconds, so nothing is done before the program has done it.
    """
    constants = sys.modules.get("peft.utils.constants")
    for name, targets in vars(constants).items() if constants is not None else ():
        llama = targets.get("llama") if name.endswith("_MODULES_MAPPING") else None
        if isinstance(llama, list) and all(part in PARTS for part in llama):
            targets.setdefault(SwatModelConfig.model_type, [PARTS[part] for part in llama])
