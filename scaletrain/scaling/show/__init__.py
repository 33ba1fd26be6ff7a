"""Show: tables, plots and pages."""
