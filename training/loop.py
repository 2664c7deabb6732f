"""The training loop that all models share: AdamW, a warm-up and a cosine, averaged weights, a log, going on where it stopped.

Knows parameters and losses; does not know what is trained.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

SAVE_EVERY_S = 60.0
LOG_EVERY = 25
AVERAGED_OVER = 0.997
"""Share that the averaged weights keep at every step, once there were some."""
LAST_RATE = 0.02


@dataclass(frozen=True, slots=True)
class Schedule:
    steps: int
    rate: float
    warm_up: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0

    def rate_at(self, step: int) -> float:
        if step < self.warm_up:
            return self.rate * (step + 1) / self.warm_up
        done = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        return self.rate * (LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


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
    """Train what of the modules wants gradients, and leave the averaged weights in them.

    `loss_at` is told the step and a generator that depends on the seed and the step alone, so a run that was stopped and
    started again draws what an undisturbed one does. `out` gets `log.jsonl` and `state.pt`, from which the same call goes on.
    `look` is called with averaged weights in place, every `look_every` steps and at the end.
    """
    out.mkdir(parents=True, exist_ok=True)
    parameters = {
        f"{name}.{key}": value
        for name, module in modules.items()
        for key, value in module.named_parameters()
        if value.requires_grad
    }
    optimiser = torch.optim.AdamW(parameters.values(), schedule.rate, betas=(0.9, 0.99), weight_decay=schedule.weight_decay)
    averaged = {key: value.detach().clone() for key, value in parameters.items()}
    state, first, spent_s = out / "state.pt", 0, 0.0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        for key, value in parameters.items():
            value.data.copy_(saved["weights"][key])
        averaged, first, spent_s = saved["averaged"], saved["step"], saved["seconds"]
        optimiser.load_state_dict(saved["optimiser"])

    def swap() -> None:
        for key, value in parameters.items():
            value.data, averaged[key] = averaged[key], value.data

    def save(step: int) -> None:
        fresh = state.with_suffix(".new")
        weights = {key: value.detach() for key, value in parameters.items()}
        torch.save(
            {"weights": weights, "averaged": averaged, "optimiser": optimiser.state_dict(), "step": step, "seconds": seconds()},
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
            for group in optimiser.param_groups:
                group["lr"] = schedule.rate_at(step)
            loss = loss_at(step, torch.Generator().manual_seed(seed * 1_000_003 + step))
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters.values(), schedule.clip)
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
                    "rate": round(schedule.rate_at(step), 6),
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


def arguments(about: str | None, *, steps: int, seed: int, rate: float | None = None, **folders: str) -> argparse.Namespace:
    """`--out`, `--steps`, `--seed`, and one option for each folder that another program made, with where it is by default.

    Of a model that may begin with trained weights, which has its usual `rate`: `--init` and `--rate`, too.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="gets the weights, a log and what to go on from"
    )
    parser.add_argument("--steps", type=int, default=steps, metavar="N")
    parser.add_argument("--seed", type=int, default=seed, metavar="N")
    if rate is not None:
        parser.add_argument("--init", type=Path, metavar="FOLDER", help="weights to begin with, laid out as the package's")
        parser.add_argument("--rate", type=float, default=rate, metavar="R", help="of learning, after the warm-up")
    for name, default in folders.items():
        parser.add_argument(f"--{name}", type=Path, default=Path(default), metavar="FOLDER")
    told = parser.parse_args()
    # Two trainings at a time are faster with a thread each than one after the other with two.
    torch.set_num_threads(1)
    torch.manual_seed(told.seed)
    return told
