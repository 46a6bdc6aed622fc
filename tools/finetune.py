"""Gradient steps after the context: PEARL or RL^2 goes on learning on a new task.

    python tools/finetune.py --rate 1e-2 --task ant --evaluate runs/ant/pearl/seed0 --extrapolate

All options but --rate are those of `run.py --evaluate`. The first round is the method's own: its
belief or its memory learns from K episodes. Then it stays as it is, and every task gets a copy of
the acting network. Each further round is one policy-gradient step on K episodes [ours]. The
gradient is GMPS's own (advantages.py): linear baseline, generalised advantages. Each task's
advantages are divided by their own size. Adam takes the step.

Letters in shapes: n tasks, K episodes per task, T steps.
"""
import argparse
import copy
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import run
from advantages import advantages, scaled_per_task
from baselines import pearl, recurrent
from baselines.rl2 import log_prob
from policy import normalised
from sac import gaussian
from settings import UserError


# ---------------------------------------------------------------- a copy of the network per task
class PearlActors:
    """PEARL's actor, one for each task. The belief about z does not change any more.

    The std of exploration has no gradient of its own, as in GMPS: it would soon shrink to nothing.
    """

    def __init__(self, adapter: pearl.Adapter, n: int):
        self.adapter = adapter
        self.parameters = [p.detach().repeat(n, 1, 1).requires_grad_() for p in adapter.actor]
        adapter.actor = self.parameters

    def begin(self, K: int) -> None:
        """K episodes of each task begin. The adapter repeats its belief itself."""
        self.drawn = []

    def explored(self) -> None:
        """Keep the noise of the actions just taken: near 1 tanh's rounding hides it."""
        self.drawn.append(self.adapter.noise.noise.flatten(0, 1))

    def gaussians(self, episodes: dict) -> tuple[torch.Tensor, ...]:
        """Mean and log-std of the actions before tanh, and these actions: (n * K, T, act)."""
        adapter = self.adapter
        seen = normalised(adapter.family, episodes["observations"][:, :-1]).to(adapter.z)
        z = adapter.z[:, None].expand(-1, seen.shape[1], -1)
        x = torch.cat([seen, z], dim=-1)
        parts = gaussian(self.parameters, x.view(len(self.parameters[0]), -1, x.shape[-1]))
        noise = torch.stack(self.drawn, dim=1).to(x)
        mean, log_std = (part.view(noise.shape) for part in parts)
        log_std = log_std.detach()
        return mean, log_std, (mean + log_std.exp() * noise).detach()


class RecurrentPolicies:
    """A recurrent policy, one for each task. Every episode begins with the memory that was held.

    It takes the place of the adapter's network. The std of exploration does not change.
    """

    def __init__(self, adapter: recurrent.Adapter, n: int):
        self.adapter, self.log_std = adapter, adapter.network.log_std.detach()
        self.copies = [copy.deepcopy(adapter.network) for _ in range(n)]
        self.parameters = [p for policy in self.copies for name, p in policy.named_parameters()
                           if name != "log_std"]
        adapter.network = self

    def __call__(self, x: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Outputs (n * K, L, act) and hidden state, each task's by its own network."""
        parts = zip(self.copies, x.chunk(len(self.copies)), hidden.chunk(len(self.copies)))
        outputs, last = zip(*(policy(*part) for policy, *part in parts))
        return torch.cat(outputs), torch.cat(last)

    def begin(self, K: int) -> None:
        """K episodes of each task begin."""
        self.adapter.memory = {name: value.repeat_interleave(K, 0)
                               for name, value in self.adapter.held.items()}

    def explored(self) -> None:
        """Nothing: the adapter keeps what it saw, and no tanh bounds its actions."""

    def gaussians(self, episodes: dict) -> tuple[torch.Tensor, ...]:
        """Mean and log-std of the actions, and the actions: (n * K, T, act)."""
        x, held = torch.stack(self.adapter.seen, dim=1), self.adapter.held["hidden"]
        actions = torch.as_tensor(episodes["actions"], dtype=torch.float32, device=held.device)
        mean, _ = self(x.to(held), held.repeat_interleave(len(x) // len(held), 0))
        return mean, self.log_std, actions


# ---------------------------------------------------------------- the method with further steps
class FineTuned:
    """PEARL's or a recurrent adapter that goes on by gradient (contract: baselines/__init__.py).

    The context is over after K episodes, the first round.
    """
    references = {}

    def __init__(self, adapter, K: int, rate: float):
        kinds = ((pearl.Adapter, PearlActors), (recurrent.Adapter, RecurrentPolicies))
        self.kind = next((own for kind, own in kinds if isinstance(adapter, kind)), None)
        if self.kind is None:
            raise UserError("only pearl, rl2 and incontext have a context after which gradient "
                            "steps begin: name the folder of such a policy")
        self.original, self.K, self.rate = adapter, K, rate

    @property
    def sequential(self) -> bool:
        return self.own is None

    def begin(self, count: int, generator: torch.Generator) -> None:
        """Start again from the trained networks and an empty context, on `count` new tasks."""
        self.adapter, self.own = copy.copy(self.original), None  # keeps the trained networks
        self.adapter.begin(count, generator)
        self.n, self.left = count, self.K

    def act(self, observation, last: dict | None = None, explore: bool = True) -> np.ndarray:
        """Actions (n * K, act)."""
        if self.own is not None and last is None:
            self.own.begin(len(observation) // self.n)
        action = self.adapter.act(observation, last, explore)
        if self.own is not None and explore:
            self.own.explored()
        return action

    def update(self, episodes: dict) -> None:
        """The method's own, in the first round. Then a step of policy gradient."""
        if self.own is None:
            self.adapter.update(episodes)
            self.left -= 1
            if self.left == 0:
                self.own = self.kind(self.adapter, self.n)
                self.optimiser = torch.optim.Adam(self.own.parameters, lr=self.rate)
            return
        self.optimiser.zero_grad()
        self.loss(episodes).sum().backward()  # tasks share no parameter
        self.optimiser.step()

    def loss(self, episodes: dict) -> torch.Tensor:
        """(n,): - mean_t( log pi(a_t|s_t) A_t ) of each task."""
        family, settings = self.adapter.family, self.adapter.settings
        mean, log_std, action = self.own.gaussians(episodes)
        start = torch.zeros(mean.shape[:2]).to(mean)
        start[:, 0] = 1
        log_p = log_prob(mean, log_std, {"action": action, "start": start}, settings)
        seen = normalised(family, episodes["observations"][:, :-1])
        seen, reward, mask = (torch.as_tensor(value, dtype=torch.float32).to(mean).unflatten(
            0, (self.n, -1)) for value in (seen, episodes["rewards"], episodes["mask"]))
        advantage = scaled_per_task(advantages(seen, reward, mask, settings), mask)
        return -(log_p.view(mask.shape) * advantage * mask).sum((1, 2)) / mask.sum((1, 2))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=1e-2, help="Adam's (default 1e-2)")
    parser.add_argument("--evaluate", required=True, metavar="DIR", help="as for run.py")
    options, others = parser.parse_known_args(arguments)
    return run.main(["--evaluate", options.evaluate, *others], partial(
        run.evaluate_saved, wrap=partial(FineTuned, rate=options.rate),
        finetune_rate=options.rate))


if __name__ == "__main__":
    sys.exit(main())
