from swat_flex.backends.banded.op import configuration, supports, swat, tunables
from swat_flex.backends.banded.tiles import BandedConfig

__all__ = ["BandedConfig", "configuration", "supports", "swat", "tunables"]
