"""Real text that every machine has, as q, k and v: the bytes of Python's own standard library."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from swat_flex.cli import options
from swat_flex.positions import apply_rope

WIDTH = 64  # channels of a byte's embedding
SEED = 0


@dataclass(frozen=True, slots=True)
class Inputs:
    """q, k, v and the output's gradient, each `[1, H, L, D]`; q, k and v require gradients."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor

    def prefix(self, length: int) -> Inputs:
        """The first `length` tokens, in memory of their own."""
        q, k, v, grad = (x.detach()[:, :, :length].clone() for x in (self.q, self.k, self.v, self.grad))
        return Inputs(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad)


def standard_library(length: int) -> bytes:
    """The first `length` bytes of the standard library's top-level modules, in the order of their names."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = b""
    for source in sorted(folder.glob("*.py")):
        text += source.read_bytes()
        if len(text) >= length:
            return text[:length]
    rule = f"at most as many tokens as {folder} has bytes of .py sources, {len(text)}"
    raise options.refused("--lengths", rule, length)


def embed(text: bytes, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """A random embedding of each byte, random projections to q, k and v of root mean square 1, RoPE on q and k.

    Unit entries make ⟨q, k⟩ / √D of order 1, as in a trained model. The seed is fixed: same text, same tensors.
    """
    random = torch.Generator().manual_seed(SEED)
    embedding = torch.randn(256, WIDTH, generator=random)
    projections = torch.randn(3, heads, WIDTH, head_dim, generator=random)
    of_byte = F.rms_norm(embedding @ projections, (head_dim,))  # [3, H, 256, D]
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    q, k, v = of_byte[:, None, :, tokens]  # [1, H, L, D] each
    grad = torch.randn(q.shape, generator=random)
    q, k, v, grad = (x.to(device, dtype) for x in (apply_rope(q), apply_rope(k), v, grad))
    return Inputs(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad)
