"""The SWAT language model: configuration, attention layer, model, loss."""

from swat_flex.nn.attention import SwatAttention
from swat_flex.nn.config import PAPER, SwatConfig
from swat_flex.nn.loss import chunked_cross_entropy
from swat_flex.nn.model import SwatTransformer

__all__ = ["PAPER", "SwatAttention", "SwatConfig", "SwatTransformer", "chunked_cross_entropy"]
