"""The planner of `rorqual autoscaler` as an entrant of the race, with a policy file as anybody would write it."""

from __future__ import annotations

from collections.abc import Mapping

from autoscaler.observation import Observation
from autoscaler.planner import Planner
from autoscaler.policy import load_policy
from bench.scale.rules import RuleConfig
from bench.scale.world import Sums

_POLICY = """
version: 1
interval_seconds: 10
objectives:
  ttft: {{percentile: {percentile:g}, seconds: {ttft:g}}}
  itl: {{percentile: {percentile:g}, seconds: {itl:g}}}
model: {model}
survive_losses: {survive_losses}
pools:
  prefill: {{role: prefill, {pool}}}
  decode: {{role: decode, {pool}}}
"""
_POOL = "replicas: {{min: 1, max: {replicas_max}}}, hardware: {hardware}, devices: {devices}, start_seconds: {start:g}"


class Ours:
    interval_seconds = 10.0

    def __init__(self, config: RuleConfig, *, survive_losses: int = 1) -> None:
        text = policy_text(config, survive_losses=survive_losses)
        self.planner = Planner(load_policy(text, file="bench.scale"))

    def decide(self, look: Observation, sums: Sums) -> Mapping[str, int]:
        return self.planner.decide(look).replicas


def policy_text(config: RuleConfig, *, survive_losses: int) -> str:
    pool = _POOL.format(
        replicas_max=config.replicas_max,
        hardware=config.hardware,
        devices=config.model.num_devices,
        start=config.start_seconds,
    )
    return _POLICY.format(
        percentile=config.percentile,
        ttft=config.ttft_seconds,
        itl=config.itl_seconds,
        model=config.model_name,
        survive_losses=survive_losses,
        pool=pool,
    )
