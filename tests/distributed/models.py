"""What one rank does in the tests of models and training."""

from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from swat_flex.distributed import local_shard
from swat_flex.nn import SwatConfig, SwatTransformer
from swat_flex.nn.loss import IGNORED
from swat_flex.training import SIZES, Trainer, TrainingConfig, loop, parallel, read_corpus

CONFIG = SwatConfig(
    vocab_size=64, hidden_size=32, layers=2, heads=4, kv_heads=2, window=(12, 40), learnable_slopes=True,
    learnable_logit_bias=True, qk_norm=True,
)  # fmt: skip


def rows(length=61):
    """tokens, targets and document ids of four rows; some targets do not count, unevenly; a document per 25 tokens."""
    draw = torch.Generator().manual_seed(7)
    tokens = torch.randint(64, (4, length + 1), generator=draw)
    targets = tokens[:, 1:].clone()
    targets[:, 5:19] = IGNORED
    ids = (torch.arange(length) // 25).repeat(4, 1)
    ids[1] = -1  # padding from here on
    ids[1, :50] = 0
    return tokens[:, :-1], targets, ids


def model_of(dtype):
    torch.manual_seed(0)
    return SwatTransformer(CONFIG).to(dtype)


def loss_and_gradients(model, loss):
    loss.backward()
    whole = {name: p.grad for name, p in model.named_parameters()}
    whole = {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in whole.items()}
    return {"loss": loss.detach(), **whole}


def alone(dtype):
    """Loss and gradients of one process."""
    model = model_of(dtype)
    return loss_and_gradients(model, model.loss(*rows()))


def model_on(rank, dtype, data, context, checkpointed, compiled):
    """Loss, which is the mean of the ranks', and gradients on a mesh (data, context) with FSDP2."""
    ranks = parallel.meshed(torch.device("cpu"), data * context, context)
    model = model_of(dtype)
    model.gradient_checkpointing = checkpointed
    if compiled:
        for block in model.blocks:
            block.compile(backend="eager")
    parallel.shard(model, ranks)
    batch = (x.tensor_split(data)[ranks.rank] for x in rows())
    if context > 1:
        batch = (local_shard(x, ranks.mesh["context"], 1) for x in batch)
    found = loss_and_gradients(model, model.loss(*batch))
    return {**found, "loss": ranks.mean(found["loss"])}


def logits_on(rank):
    """Logits of this rank's tokens, FSDP apart, and an error's text where one rank has another batch."""
    model = model_of(torch.float64)
    model.context = parallel.meshed(torch.device("cpu"), dist.get_world_size(), dist.get_world_size()).mesh["context"]
    tokens, _, ids = (local_shard(x, model.context, 1) for x in rows())
    logits = model(tokens, ids).detach()
    try:
        model(tokens[: 3 + (rank > 0)])
    except ValueError as error:
        return logits, str(error)
    return logits, None


TRAINING = TrainingConfig(steps=50, batch=4, warmup=5, eval_every=25, eval_tokens=600, save_every=100)


class Curve:
    """A listener that remembers evaluations."""

    def __init__(self):
        self.evaluations = []

    def progress(self, progress):
        pass

    def evaluated(self, step, bits_per_byte):
        self.evaluations.append(bits_per_byte)

    def saved(self, path):
        pass


def trained(rank, texts, folder, context=1, size="tiny", dtype=torch.float32, until=None, resume=False):
    """The loss of every step, and the evaluations that the first rank was told."""
    ranks = None
    if dist.is_initialized():
        ranks = parallel.meshed(torch.device("cpu"), dist.get_world_size(), context)
    training = replace(TRAINING, length={"tiny": 61, "small": 301}[size])
    with mock.patch.object(loop, "SwatTransformer", lambda config: SwatTransformer(config).to(dtype)):
        trainer = Trainer(SIZES[size].model, training, read_corpus(Path(texts)), Path(folder), ranks=ranks)
    if resume:
        trainer.resume()
    losses, step = [], trainer._train_step

    def kept(rate):
        losses.append(step(rate))
        return losses[-1]

    trainer._train_step = kept
    ear = Curve()
    trainer.run(ear, until=until)
    return torch.stack(losses), ear.evaluations
