"""The version of this package, its single source."""

__version__ = "0.1.0"
