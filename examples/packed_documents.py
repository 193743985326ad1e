"""Pack documents of different lengths into one row: they do not see each other, and padding gives exact zeros.

It checks itself: output and gradients must be those of each document alone, computed by `naive_swat`.
"""

import itertools

import torch

from swat_flex import document_ids_from_cu_seqlens, flex_swat, naive_swat

LENGTHS, PADDED, WINDOW = (30, 50, 1, 70), 192, 24  # tokens


def main() -> None:
    torch.manual_seed(0)
    ends = torch.tensor([0, *itertools.accumulate(LENGTHS)])
    document_ids = document_ids_from_cu_seqlens(ends, PADDED)  # [192]: 0 0 … 3 3, and −1 for padding
    q, k, v = torch.randn(3, 1, 4, PADDED, 32).unbind()
    for x in (q, k, v):
        x.requires_grad_()

    out = flex_swat(q, k, v, WINDOW, document_ids=document_ids)
    weight = torch.randn_like(out)
    gradients = torch.autograd.grad((out * weight).sum(), (q, k, v))

    for number, (start, stop) in enumerate(itertools.pairwise(ends.tolist())):
        alone = [x[:, :, start:stop].detach().double().requires_grad_() for x in (q, k, v)]
        expected = naive_swat(*alone, WINDOW)
        exact = torch.autograd.grad((expected * weight[:, :, start:stop]).sum(), alone)
        pairs = zip((out, *gradients), (expected, *exact), strict=True)
        error = max((packed[:, :, start:stop] - single).abs().max().item() for packed, single in pairs)
        assert error < 1e-4, error
        print(f"document {number}: {stop - start:2} tokens, largest difference from it alone {error:.1e}")

    padding = ends[-1].item()
    assert all((x[:, :, padding:] == 0).all() for x in (out, *gradients))
    print(f"padding: {PADDED - padding} tokens, output and gradients exactly 0")


if __name__ == "__main__":
    main()
