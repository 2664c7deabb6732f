"""Training loop of all models: AdamW or Muon, warm-up and cosine schedule, averaged weights, log file, resume."""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from training.muon import Muon, matrices

SAVE_EVERY_S = 60.0
LOG_EVERY = 25
AVERAGED_OVER = 0.997
"""Decay of the averaged weights per step. Lower in the first steps."""
LAST_RATE = 0.02
"""Final learning rate relative to the maximum."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Steps, learning rate and regularisation of a training."""

    steps: int
    rate: float
    """Maximum learning rate of AdamW, after the warm-up."""
    muon_rate: float | None = None
    """Maximum learning rate of linear and convolutional layers with Muon. None: AdamW trains them too."""
    warm_up: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0

    def share_at(self, step: int) -> float:
        """Return the learning rate of a step relative to the maximum."""
        if step < self.warm_up:
            return (step + 1) / self.warm_up
        done = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        return LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def train(
    modules: Mapping[str, nn.Module],
    loss_at: Callable[[int, torch.Generator], Tensor],
    schedule: Schedule,
    out: Path,
    seed: int,
    *,
    look: Callable[[int], None] | None = None,
    look_every: int = 500,
) -> None:
    """Train all parameters that require gradients. At the end the modules have the averaged weights.

    `loss_at` gets the step and a generator that depends only on the seed and the step, so that a resumed run draws the same
    random numbers as an uninterrupted one. Writes `log.jsonl` and `state.pt` to `out`; the same call resumes from them.
    `look` is called every `look_every` steps, while the modules have the averaged weights.
    """
    out.mkdir(parents=True, exist_ok=True)
    parameters = {
        f"{name}.{key}": value
        for name, module in modules.items()
        for key, value in module.named_parameters()
        if value.requires_grad
    }
    optimisers = _optimisers(modules.values(), list(parameters.values()), schedule)
    averaged = {key: value.detach().clone() for key, value in parameters.items()}
    state, first, spent_s = out / "state.pt", 0, 0.0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        for key, value in parameters.items():
            value.data.copy_(saved["weights"][key])
        averaged, first, spent_s = saved["averaged"], saved["step"], saved["seconds"]
        for optimiser, before in zip(optimisers, saved["optimisers"], strict=True):
            optimiser.load_state_dict(before)

    def swap() -> None:
        for key, value in parameters.items():
            value.data, averaged[key] = averaged[key], value.data

    def save(step: int) -> None:
        fresh = state.with_suffix(".new")
        weights = {key: value.detach() for key, value in parameters.items()}
        torch.save(
            {
                "weights": weights,
                "averaged": averaged,
                "optimisers": [optimiser.state_dict() for optimiser in optimisers],
                "step": step,
                "seconds": seconds(),
            },
            fresh,
        )
        os.replace(fresh, state)

    began = time.process_time()

    def seconds() -> float:
        return spent_s + time.process_time() - began

    running: float | None = None
    saved_at = time.monotonic()
    with (out / "log.jsonl").open("a") as log:
        print(
            json.dumps({"schedule": asdict(schedule), "seed": seed, "parameters": sum(p.numel() for p in parameters.values())}),
            file=log,
        )
        for step in range(first, schedule.steps):
            share = schedule.share_at(step)
            for optimiser in optimisers:
                optimiser.param_groups[0]["lr"] = share * optimiser.defaults["lr"]
            loss = loss_at(step, torch.Generator().manual_seed(seed * 1_000_003 + step))
            for value in parameters.values():
                value.grad = None
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters.values(), schedule.clip)
            for optimiser in optimisers:
                optimiser.step()
            with torch.no_grad():
                kept = min(AVERAGED_OVER, (1 + step) / (10 + step))
                torch._foreach_lerp_(list(averaged.values()), [p.detach() for p in parameters.values()], 1 - kept)
            running = loss.item() if running is None else running * 0.98 + loss.item() * 0.02
            if (step + 1) % LOG_EVERY == 0:
                told = {
                    "step": step + 1,
                    "cpu_s": round(seconds(), 1),
                    "loss": round(running, 5),
                    "rate": round(share * schedule.rate, 6),
                }
                print(json.dumps(told), file=log, flush=True)
            if time.monotonic() - saved_at > SAVE_EVERY_S:
                save(step + 1)
                saved_at = time.monotonic()
            if look is not None and (step + 1) % look_every == 0:
                swap()
                look(step + 1)
                swap()
        save(schedule.steps)
    swap()


def _optimisers(modules: Iterable[nn.Module], trained: list[nn.Parameter], schedule: Schedule) -> list[torch.optim.Optimizer]:
    layers = matrices(modules) if schedule.muon_rate else []
    known = {id(weight) for weight in layers}
    others = [value for value in trained if id(value) not in known]
    adamw = torch.optim.AdamW(others, schedule.rate, betas=(0.9, 0.99), weight_decay=schedule.weight_decay)
    return [adamw, Muon(layers, schedule.muon_rate)] if schedule.muon_rate else [adamw]


def arguments(about: str | None, *, steps: int, seed: int, rate: float | None = None, **folders: str) -> argparse.Namespace:
    """Parse `--out`, `--steps`, `--seed`, and one option per folder in `folders`, which gives the defaults.

    If `rate` is given, also parse `--init` (weights to start from) and `--rate`. Limits torch to one thread and seeds it.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="output folder for weights, log and resume state"
    )
    parser.add_argument("--steps", type=int, default=steps, metavar="N")
    parser.add_argument("--seed", type=int, default=seed, metavar="N")
    if rate is not None:
        parser.add_argument("--init", type=Path, metavar="FOLDER", help="initial weights, in the layout of the package")
        parser.add_argument("--rate", type=float, default=rate, metavar="R", help="learning rate after the warm-up")
    for name, default in folders.items():
        parser.add_argument(f"--{name}", type=Path, default=Path(default), metavar="FOLDER")
    told = parser.parse_args()
    # Two trainings in parallel with one thread each are faster than two in sequence with two threads.
    torch.set_num_threads(1)
    torch.manual_seed(told.seed)
    return told
