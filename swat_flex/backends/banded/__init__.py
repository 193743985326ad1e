from swat_flex.backends.banded.decode import decode
from swat_flex.backends.banded.op import configuration, supports, swat
from swat_flex.backends.banded.tiles import BandedConfig

__all__ = ["BandedConfig", "configuration", "decode", "supports", "swat"]
