"""Explain: what limits a run, and how runs compare."""
