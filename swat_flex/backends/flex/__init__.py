from swat_flex.backends.flex.config import FlexConfig
from swat_flex.backends.flex.op import configuration, supports, swat, tunables

__all__ = ["FlexConfig", "configuration", "supports", "swat", "tunables"]
