"""Planner: cluster + profile + demand of a script -> layout, duration and cost. Does not use Ray; callers pass the cluster."""

from vidgen_ray.planner.cluster import parse_gpus

__all__ = ["parse_gpus"]
