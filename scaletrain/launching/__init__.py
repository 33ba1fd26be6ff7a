"""A launcher is a pure function from a job to a plan; supervising carries the plan out. No torch in this room."""
