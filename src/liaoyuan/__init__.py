"""Liaoyuan (燎原): from raw text to a reasoning assistant that one owns, on whatever hardware one has."""

__version__ = "0.1.0"
