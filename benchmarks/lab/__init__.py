"""This repository's own pages: what the package claims, held against measurements and papers."""
