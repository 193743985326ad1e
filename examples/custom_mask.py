"""Compose SWAT's modifiers with a mask of your own, through PyTorch's FlexAttention: every second key of the window.

It checks itself: against the formula written down densely, and, without the mask of our own, against `naive_swat`.
"""

import warnings

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, and_masks, create_block_mask, flex_attention

from swat_flex import alibi_slopes, naive_swat
from swat_flex.modifiers import MaskMod, band_mask, log_sigmoid_score, sigmoid_sum

HEADS, LENGTH, DIM, WINDOW = 4, 256, 32, 64


def dilated(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """Keys an even number of tokens before the query."""
    return (q_idx - kv_idx) % 2 == 0


def attend(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, mask: MaskMod) -> Tensor:
    """Σ σ(x) v over the keys of the mask. Wrap `flex_attention` in torch.compile for one fused kernel."""
    blocks = create_block_mask(mask, None, None, LENGTH, LENGTH, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of FlexAttention, that it is not compiled here
        out, aux = flex_attention(q, k, v, log_sigmoid_score(slopes), blocks, return_aux=AuxRequest(lse=True))
    return sigmoid_sum(out, aux.lse)


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, HEADS, LENGTH, DIM).unbind()
    slopes, band = alibi_slopes(HEADS), band_mask(WINDOW - 1, 0)

    error = (attend(q, k, v, slopes, band) - naive_swat(q, k, v, WINDOW, slopes=slopes)).abs().max()
    assert error < 1e-3, error
    print(f"the window alone: largest difference from the definition {error:.1e}")

    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    visible = (distance >= 0) & (distance < WINDOW) & (distance % 2 == 0)
    logits = q @ k.transpose(-1, -2) * DIM**-0.5 + slopes[:, None, None] * distance.abs()
    expected = (logits.sigmoid() * visible) @ v
    error = (attend(q, k, v, slopes, and_masks(band, dilated)) - expected).abs().max()
    assert error < 1e-3, error
    print(f"every second key of it: {visible[-1].sum()} keys a query, largest difference from the formula {error:.1e}")


if __name__ == "__main__":
    main()
