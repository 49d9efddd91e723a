"""ShadowRadix: which prefixes a worker keeps, where computing can resume, and what goes first. Pure, no torch.

A worker's scheduler owns one index and calls it between steps; the router's simulation runs the same code. The index
says which page and tail ids stand for which prefix; the ids, and the bytes behind them, are its caller's. Nothing here
may read a clock, draw randomness, or wait.
"""

from kvstore.shadow_radix.changes import Changes
from kvstore.shadow_radix.eviction import Ageing, Costs, EvictionOrder, EvictionQueue
from kvstore.shadow_radix.in_progress import InProgress, Wait
from kvstore.shadow_radix.index import Evicted, EvictedPage, EvictedTail, ShadowRadix
from kvstore.shadow_radix.node import Match, Pin, TailKind
from kvstore.shadow_radix.resume import Start, StartKind, cheapest_start
from kvstore.shadow_radix.retention import TailPlan, TailPolicy, plan_tails, turn_end

__all__ = [
    "Ageing",
    "Changes",
    "Costs",
    "Evicted",
    "EvictedPage",
    "EvictedTail",
    "EvictionOrder",
    "EvictionQueue",
    "InProgress",
    "Match",
    "Pin",
    "ShadowRadix",
    "Start",
    "StartKind",
    "TailKind",
    "TailPlan",
    "TailPolicy",
    "Wait",
    "cheapest_start",
    "plan_tails",
    "turn_end",
]
