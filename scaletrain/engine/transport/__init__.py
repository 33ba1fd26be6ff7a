"""The contract of a transport; every other file here is one wire."""
