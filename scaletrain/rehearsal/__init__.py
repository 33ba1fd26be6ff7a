"""A cluster of hosts on one machine: Linux namespaces behind a switch, with shaped links. Linux only; imports no torch."""

from scaletrain.rehearsal.cluster import Cluster, Traffic

__all__ = ["Cluster", "Traffic"]
