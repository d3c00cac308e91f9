"""A cluster on one machine: nodes in network namespaces of their own, joined by links that are as
slow as wanted, can be cut, and count what they carry. `python -m tests.cluster --help`."""

from .network import Cluster, Link, Node, obstacle

__all__ = ["Cluster", "Link", "Node", "obstacle"]
