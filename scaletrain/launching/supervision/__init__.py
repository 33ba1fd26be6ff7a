"""Start a plan, watch it, name the first cause of a failure, and leave nothing behind."""
