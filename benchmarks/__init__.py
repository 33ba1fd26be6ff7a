"""Measurements of this repository: run from a checkout, not part of the package."""
