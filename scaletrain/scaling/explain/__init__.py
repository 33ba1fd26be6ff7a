"""Explain: the limiter of each cell, and the change from one report to another."""
