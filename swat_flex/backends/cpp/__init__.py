from swat_flex.backends.cpp.decode import decode as swat_decode
from swat_flex.backends.cpp.library import describe
from swat_flex.backends.cpp.op import CppConfig, supports, swat, tunables

__all__ = ["CppConfig", "describe", "supports", "swat", "swat_decode", "tunables"]
