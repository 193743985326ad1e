from swat_flex.backends.banded.op import supports, swat
from swat_flex.backends.banded.tiles import BandedConfig, configuration

__all__ = ["BandedConfig", "configuration", "supports", "swat"]
