"""GPUs + profile + script -> layout, seconds, cost. Knows no Ray: whoever asks says which machines there are."""

from vidgen_ray.planner.calibration import Measured, load_measured, remember_measured
from vidgen_ray.planner.choose_layout import plan
from vidgen_ray.planner.cluster import Cluster, Node, parse_gpus, this_machine
from vidgen_ray.planner.demand import Demand, demand_of
from vidgen_ray.planner.estimate import Considered, Plan, cpus_needed
from vidgen_ray.planner.gpu_assignment import TURN_SHOTS

__all__ = [
    "TURN_SHOTS",
    "Cluster",
    "Considered",
    "Demand",
    "Measured",
    "Node",
    "Plan",
    "cpus_needed",
    "demand_of",
    "load_measured",
    "parse_gpus",
    "plan",
    "remember_measured",
    "this_machine",
]
