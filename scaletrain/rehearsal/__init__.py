"""A cluster of hosts on one machine: Linux namespaces behind a switch, with shaped links.

This room knows no job: it makes hosts, runs commands on them and harms their links. Linux only.
"""

from scaletrain.rehearsal.cluster import Cluster, Traffic

__all__ = ["Cluster", "Traffic"]
