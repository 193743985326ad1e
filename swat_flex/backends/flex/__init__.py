from swat_flex.backends.flex.op import configuration, supports, swat
from swat_flex.backends.flex.programs import FlexConfig

__all__ = ["FlexConfig", "configuration", "supports", "swat"]
