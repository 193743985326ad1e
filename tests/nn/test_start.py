"""Where training starts: what the first layer's attention adds to the residual stream, in the paper and the recipe."""

import sysconfig
from pathlib import Path

import pytest
import torch

from swat_flex import SwatConfig, SwatTransformer
from swat_flex.nn import PAPER

SIZE = {"vocab_size": 264, "hidden_size": 96, "layers": 3, "heads": 12, "window": 64, "tie_embeddings": True}
KINDS = {
    "paper": {**PAPER, "slopes": "12:0", "rope": False},
    "recipe": {},
    "softmax": {"activation": "softmax", "slopes": None},
}


def start(**options):
    """(rms of attention's output over that of the residual stream, cosine of neighbouring tokens' outputs)."""
    torch.manual_seed(0)
    block = (model := SwatTransformer(SwatConfig(**{**SIZE, **options}))).blocks[0]
    text = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_bytes()[: 16 * 256]
    with torch.no_grad():
        x = model.embedding(torch.tensor(list(text)).view(16, 256))
        out = block.attention(block.attention_norm(x))[:, 64:]  # of full windows
    cosine = torch.cosine_similarity(out[:, 1:], out[:, :-1], dim=-1).mean().item()
    return (out.square().mean() / x.square().mean()).sqrt().item(), cosine


def test_the_papers_start_drowns_the_token_and_the_recipes_does_not():
    """Without a bias attention outweighs the stream and is the same at every token; with the recipe it is neither."""
    share, cosine = {}, {}
    for name, options in KINDS.items():
        share[name], cosine[name] = start(**options)
    print(share, cosine)
    assert share["paper"] > 3
    assert cosine["paper"] > 0.99
    assert share["recipe"] < 0.7
    assert share["softmax"] < 0.5
    assert cosine["recipe"] < 0.97


def test_a_row_of_the_papers_weights_sums_to_far_more_than_one():
    slopes = SwatConfig(heads=12, slopes="12:0").head_slopes()
    sums = torch.sigmoid(slopes[:, None] * torch.arange(64)).sum(1)
    print(sums)
    assert sums.mean().item() == pytest.approx(20.7, abs=0.1)
