"""Training of byte-level SWAT models: data, loop, checkpoints."""

from swat_flex.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from swat_flex.training.config import SIZES, TrainingConfig
from swat_flex.training.data import SEPARATOR, Corpus, Sampler, read_corpus
from swat_flex.training.loop import Progress, Trainer, load_model, model_of

__all__ = [
    "SEPARATOR",
    "SIZES",
    "CheckpointError",
    "Corpus",
    "Progress",
    "Sampler",
    "Trainer",
    "TrainingConfig",
    "load_checkpoint",
    "load_model",
    "model_of",
    "read_corpus",
    "save_checkpoint",
]
