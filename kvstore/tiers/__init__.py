"""Tiers below a worker's device: where pages and tails go that the device has no room for. Pure, no torch."""

from kvstore.tiers.host_index import Above, HostCounts, HostIndex, HostMatch, HostPage, HostTail

__all__ = ["Above", "HostCounts", "HostIndex", "HostMatch", "HostPage", "HostTail"]
