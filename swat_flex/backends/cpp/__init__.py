from swat_flex.backends.cpp.library import describe
from swat_flex.backends.cpp.op import CppConfig, supports, swat, tunables

__all__ = ["CppConfig", "describe", "supports", "swat", "tunables"]
