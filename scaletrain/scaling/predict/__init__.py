"""Predict: step times from network models and fits."""
