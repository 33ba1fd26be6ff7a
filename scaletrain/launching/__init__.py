"""Launching: a launcher turns a job into a plan; supervision carries the plan out. No torch here."""
