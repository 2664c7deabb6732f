"""Planner: cluster + profile + demand of a script -> layout, duration and cost. Does not use Ray; callers pass the cluster."""

from typing import TYPE_CHECKING

from vidgen_ray.system.lazy_names import lazy_names

if TYPE_CHECKING:
    from vidgen_ray.planner.choose_layout import ConsideredLayout, Plan, cpus_needed, plan_run
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
    "plan_run",
    "profile_for",
    "save_calibration",
    "save_measurements",
    "swap_groups",
    "this_machine",
]

# Imported lazily: those who read profiles need no solver.
__getattr__ = lazy_names(
    __name__,
    {
        "Calibration": "demand",
        "calibrations": "demand",
        "Cluster": "cluster",
        "ConsideredLayout": "choose_layout",
        "cpus_needed": "choose_layout",
        "Demand": "demand",
        "demand_of": "demand",
        "load_calibration": "demand",
        "Measurement": "demand",
        "Node": "cluster",
        "parse_gpus": "cluster",
        "peak_shares": "demand",
        "Plan": "choose_layout",
        "plan_run": "choose_layout",
        "profile_for": "cluster",
        "save_calibration": "demand",
        "save_measurements": "demand",
        "SHOTS_PER_SWAP": "layout",
        "ShotSizes": "gpu_memory",
        "SizeCheck": "gpu_memory",
        "swap_groups": "gpu_memory",
        "this_machine": "cluster",
    },
)
