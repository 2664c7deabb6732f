"""Planner: cluster + profile + demand of a script -> layout, duration and cost. Does not use Ray; callers pass the cluster."""

from vidgen_ray.planner.choose_layout import ConsideredLayout, Plan, cpus_needed, plan
from vidgen_ray.planner.cluster import Cluster, Node, parse_gpus, profile_for, this_machine
from vidgen_ray.planner.demand import (
    Calibration,
    Demand,
    Measurement,
    calibrations,
    demand_of,
    load_calibration,
    peak_shares,
    save_calibration,
    save_measurements,
)
from vidgen_ray.planner.gpu_memory import ShotSizes, SizeCheck, swap_groups
from vidgen_ray.planner.layout import SHOTS_PER_SWAP

__all__ = [
    "SHOTS_PER_SWAP",
    "Calibration",
    "Cluster",
    "ConsideredLayout",
    "Demand",
    "Measurement",
    "Node",
    "Plan",
    "ShotSizes",
    "SizeCheck",
    "calibrations",
    "cpus_needed",
    "demand_of",
    "load_calibration",
    "parse_gpus",
    "peak_shares",
    "plan",
    "profile_for",
    "save_calibration",
    "save_measurements",
    "swap_groups",
    "this_machine",
]
