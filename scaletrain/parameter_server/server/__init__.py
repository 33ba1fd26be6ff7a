"""The server: it owns parameters and their optimizer."""
