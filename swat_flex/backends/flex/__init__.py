from swat_flex.backends.flex.config import FlexConfig
from swat_flex.backends.flex.op import supports, swat, tunables

__all__ = ["FlexConfig", "supports", "swat", "tunables"]
