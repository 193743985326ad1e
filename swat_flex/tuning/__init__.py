"""Measure what runs fastest on this machine, once, and remember it: what each backend lets autotune choose."""

from swat_flex.tuning.results import Outcome, Tuned
from swat_flex.tuning.tune import tune

__all__ = ["Outcome", "Tuned", "tune"]
