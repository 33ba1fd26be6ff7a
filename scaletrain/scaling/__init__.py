"""The science of scaling: measure, explain, predict and show. Imports no torch."""
