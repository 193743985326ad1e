from swat_flex.backends.triton.config import TritonConfig
from swat_flex.backends.triton.op import configuration, supports, swat, tunables

__all__ = ["TritonConfig", "configuration", "supports", "swat", "tunables"]
