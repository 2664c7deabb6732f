"""Planner: cluster + profile + demand of a script -> layout, duration and cost. Does not use Ray; callers pass the cluster."""

from vidgen_ray.planner.calibration import Calibration, Measurement, load_calibration, save_calibration, save_measurements
from vidgen_ray.planner.choose_layout import plan
from vidgen_ray.planner.cluster import Cluster, Node, parse_gpus, this_machine
from vidgen_ray.planner.demand import Demand, ShotSizes, demand_of
from vidgen_ray.planner.estimate import ConsideredLayout, Plan, cpus_needed
from vidgen_ray.planner.gpu_assignment import SHOTS_PER_SWAP
from vidgen_ray.planner.memory import SizeCheck
from vidgen_ray.planner.one_process import swap_groups

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
    "cpus_needed",
    "demand_of",
    "load_calibration",
    "parse_gpus",
    "plan",
    "save_calibration",
    "save_measurements",
    "swap_groups",
    "this_machine",
]
