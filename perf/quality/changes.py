"""What is tried on the recipe: each change with its reason, as `--kinds "SWAT recipe + output gate"`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swat_flex.nn import SwatAttention, SwatTransformer


@dataclass(frozen=True, slots=True)
class Change:
    """One difference from a kind.

    why: what it might mend.
    attention: what is done to each layer's attention before training; parameters that it adds are trained.
    of_both: tried on softmax with learnt ALiBi slopes too.
    """

    why: str
    attention: Callable[[SwatAttention], None]
    of_both: bool = True

    def apply(self, model: SwatTransformer, optimizer: torch.optim.Optimizer) -> None:
        """Change every layer, and train what that adds: matrices, which decay, first of the optimizer's groups."""
        known = set(model.parameters())
        for layer in list(model.modules()):
            if isinstance(layer, SwatAttention):
                self.attention(layer)
        added = [parameter for parameter in model.parameters() if parameter not in known]
        optimizer.param_groups[0]["params"] += added


def _faster_slopes(attention: SwatAttention) -> None:
    """A parameter in units of 3 learns at 3 times the rate: AdamW's steps do not depend on the units."""
    attend = attention.attend
    assert attention.slopes is not None
    with torch.no_grad():
        attention.slopes.div_(3)
    attention.attend = lambda *qkvw, slopes, **given: attend(*qkvw, slopes=3 * slopes, **given)


def _output_gate(attention: SwatAttention) -> None:
    """Multiply each channel before W_o by 2·σ(W x): 1 on average at the start."""
    config = attention.config
    attention.gate = nn.Linear(config.hidden_size, config.heads * config.channels, bias=False)
    nn.init.normal_(attention.gate.weight, std=config.init_std)
    gates: list[Tensor] = []
    attention.register_forward_pre_hook(lambda module, given: gates.append(2 * torch.sigmoid(module.gate(given[0]))))
    attention.out.register_forward_pre_hook(lambda _, given: (given[0] * gates.pop(),))


def _query_bias(attention: SwatAttention) -> None:
    """Add W x to the logits of a query, a number for each head: one more channel of q beside ones in k."""
    config, attend = attention.config, attention.attend
    attention.shift = nn.Linear(config.hidden_size, config.heads, bias=False)
    nn.init.zeros_(attention.shift.weight)
    shifts: list[Tensor] = []
    attention.register_forward_pre_hook(lambda module, given: shifts.append(module.shift(given[0])))

    def shifted(q: Tensor, k: Tensor, v: Tensor, window: int | None, **given: Any) -> Tensor:
        shift = shifts.pop().transpose(1, 2)[..., None] * config.channels**0.5
        q, k = torch.cat((q, shift), -1), F.pad(k, (0, 1), value=1.0)
        return attend(q, k, v, window, scale=config.channels**-0.5, **given)

    attention.attend = shifted


CHANGES = {
    "slopes at 3 times the rate": Change("trained slopes end far from where they start", _faster_slopes),
    "output gate": Change("a sigmoid's output has no fixed size: let the token choose it", _output_gate),
    "query bias": Change("a token chooses how much it attends; softmax cannot", _query_bias, of_both=False),
}
