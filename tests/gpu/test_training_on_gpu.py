"""Training and generation on a CUDA device: bfloat16, compiled blocks, the same numbers after a resume."""

import pytest
import torch

from swat_flex.training import SIZES, Trainer, TrainingConfig, load_checkpoint, load_model, read_corpus
from swat_flex.training.parallel import Ranks

pytestmark = pytest.mark.gpu
TRAINING = TrainingConfig(steps=6, length=256, batch=4, warmup=2, eval_every=3, eval_tokens=2048, save_every=3)


@pytest.mark.parametrize("compiled", [False, True])
def test_it_trains_resumes_and_generates(tmp_path, compiled):
    (tmp_path / "text").mkdir()
    for i in range(4):
        (tmp_path / "text" / str(i)).write_text(f"sentence {i} " * 500)
    corpus, ranks = read_corpus(tmp_path / "text"), Ranks(torch.device("cuda"))

    def trainer():
        return Trainer(SIZES["tiny"].model, TRAINING, corpus, tmp_path / "run", ranks=ranks, compiled=compiled)

    first = trainer()
    before = first.evaluate()
    first.run(until=3)
    second = trainer()
    second.resume()
    second.run()
    assert load_checkpoint(tmp_path / "run")["step"] == 6
    assert second.evaluate() < before
    model = load_model(tmp_path / "run", "cuda").bfloat16()
    assert model.generate(torch.tensor([[256, 65]], device="cuda"), 40).shape == (1, 42)
