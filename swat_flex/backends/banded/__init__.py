from swat_flex.backends.banded.op import configuration, supports, swat
from swat_flex.backends.banded.tiles import BandedConfig

__all__ = ["BandedConfig", "configuration", "supports", "swat"]
