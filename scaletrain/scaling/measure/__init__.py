"""Measure: run jobs, read their records, summarise them with intervals."""
