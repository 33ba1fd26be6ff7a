"""Supervision: start a plan, watch it, name the first cause of a failure, leave nothing behind."""
