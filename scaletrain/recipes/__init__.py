"""Recipes: the papers of the reading list as jobs that run here, each with its claim as a rule.

A recipe is one YAML file of this folder (``recipe.Recipe`` has its keys). It names a job, variants
of it, and claims: a figure of one variant beside that of another, and the limits between which the
interval over seeds must lie. The limits are written down before the recipe is run.
"""
