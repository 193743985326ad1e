from swat_flex.backends.banded.decode import decode as swat_decode
from swat_flex.backends.banded.op import supports, swat, tunables
from swat_flex.backends.banded.tiles import BandedConfig

__all__ = ["BandedConfig", "supports", "swat", "swat_decode", "tunables"]
