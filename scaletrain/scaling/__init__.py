"""The science of scaling: sweep, fit, simulate, name the limiter, report. Reads records and reports; imports no torch."""
