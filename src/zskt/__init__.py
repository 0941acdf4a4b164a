"""zskt: distil a trained network into a smaller one without any data."""

__version__ = "0.1.0"
