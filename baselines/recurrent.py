"""What rl2.py and incontext.py share: a policy that adapts through its memory.

A gated recurrent unit (GRU; Cho et al. 2014, arXiv 1406.1078) reads a whole *trial*: E episodes of
one task, one after the other. Its hidden state, the memory, lasts from one episode to the next and
is empty when a trial begins. The input of a step is that of RL^2 (Duan et al. 2016, arXiv
1611.02779): the observation; action and reward of the step before, also across the border of two
episodes; and a flag, 1 if that step was the last of an episode.

Letters in shapes: B trials at once, each in an environment of its own, ordered by task; E episodes
of T steps; L steps of a trial.
"""
import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

import settings as settings_module
from advantages import return_and_distance
from baselines import refuse_images
from policy import CorrelatedNoise, detached, normalised, set_rates, uniform
from settings import random_streams


@dataclass(frozen=True)
class Settings(settings_module.Settings):
    """The reward in the input is scaled as for the experts, by `expert_reward_scale`."""
    iterations: int = settings_module.within(
        333, 1, 1_000_000, "*iterations: trials on all training tasks, then gradient steps")
    trials: int = settings_module.within(5, 1, 10_000, "*trials per training task and iteration")
    trial_episodes: int = settings_module.within(
        3, 1, 1000, "*E, episodes of a trial: memory lasts from one to the next")
    after_trial: str = settings_module.one_of(
        "hold", ("hold", "go on"),
        "at meta-test, after E episodes: every further one starts with the memory that the E-th "
        "started with; or the memory goes on changing")
    memory: int = settings_module.within(128, 1, 4096, "*units of the GRU")
    memory_rate: float = settings_module.within(
        1e-3, 1e-7, 1.0, "*Adam's learning rate; falls to the share final_rate")
    memory_clip_norm: float = settings_module.within(
        0.5, 1e-3, 1e6, "of each network's gradient")
    min_std: float = settings_module.within(0.1, 1e-6, 10.0, "floor of the exploration noise")
    # What --quick changes beside settings.QUICK
    quick = dict(iterations=2, trials=2, memory=32)


# ---------------------------------------------------------------- networks
class Network(torch.nn.Module):
    """x (B, L, inputs) -> (outputs (B, L, outputs), hidden state (B, memory) after the last step).

    Encoder, GRU, head. The head sees the encoded input beside the memory, so that a quick reaction
    need not pass through it.
    """

    def __init__(self, inputs: int, outputs: int, settings: Settings, generator: torch.Generator):
        super().__init__()
        width, memory = settings.hidden, settings.memory
        self.encoder = torch.nn.Linear(inputs, width)
        self.gru = torch.nn.GRU(width, memory, batch_first=True)
        self.head = torch.nn.Linear(width + memory, width)
        self.output = torch.nn.Linear(width, outputs)
        with torch.no_grad():  # torch.nn draws from the global generator: draw again from ours
            for layer, fan_in in ((self.encoder, inputs), (self.gru, memory),
                                  (self.head, width + memory), (self.output, width)):
                for parameter in layer.parameters():
                    parameter.copy_(uniform(parameter.shape, fan_in, generator, parameter.dtype))
            # Outputs start near 0: the first trials then explore in all directions alike.
            self.output.weight.mul_(0.01)
            self.output.bias.zero_()

    def forward(self, x: torch.Tensor,
                hidden: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        encoded = self.encoder(x).relu()
        remembered, last = self.gru(encoded, None if hidden is None else hidden[None])
        return self.output(self.head(torch.cat([encoded, remembered], -1)).relu()), last[0]


class Policy(Network):
    """Outputs are means of actions (act,). One log-std per action dimension, as in policy.py."""

    def __init__(self, family, settings: Settings, generator: torch.Generator):
        super().__init__(input_size(family), family.action_size, settings, generator)
        std = max(settings.init_std, settings.min_std)
        self.log_std = torch.nn.Parameter(torch.full((family.action_size,), math.log(std)))


def input_size(family) -> int:
    """Observation, action, reward, flag."""
    return family.observation_size + family.action_size + 2


# ---------------------------------------------------------------- acting, and meta-test
class Adapter:
    """Acts, and remembers (contract: baselines/__init__.py). No gradient at meta-test."""
    sequential = True

    def __init__(self, policy: dict, family, settings: Settings, device="cpu"):
        refuse_images(family, settings)
        self.family, self.settings, self.device, self.references = family, settings, device, {}
        self.network = Policy(family, settings, torch.Generator()).to(device)
        self.network.load_state_dict(policy)

    def begin(self, count: int, generator: torch.Generator) -> None:
        """Empty memory, for `count` new trials."""
        self.generator, self.episode = generator, 0
        sizes = {"hidden": self.settings.memory, "action": self.family.action_size, "reward": 1,
                 "ended": 1}
        # Replaced at every change, never changed in place: so a reference to it does for a copy.
        self.memory = {name: torch.zeros(count, size, device=self.device)
                       for name, size in sizes.items()}
        self.held = self.memory

    @torch.no_grad()
    def act(self, observation, last: dict | None = None, explore: bool = True) -> np.ndarray:
        """Actions (B, act). The memory of an episode that is over stays as it is."""
        if last is None:
            self.seen = []
            self.noise = CorrelatedNoise((len(observation), self.family.action_size),
                                         self.settings.expert_noise_correlation, self.generator)
        else:
            self.memory = self.memory | {"reward": self._column(last["reward"]),
                                         "ended": torch.zeros_like(self.memory["ended"])}
        memory = self.memory
        x = torch.cat([normalised(self.family, observation).to(self.device), memory["action"],
                       self.settings.expert_reward_scale * memory["reward"], memory["ended"]], -1)
        mean, hidden = self.network(x[:, None], memory["hidden"])
        action = mean[:, 0]
        if explore:
            # Not clipped here: the environment clips, and log pi must be that of the sample itself.
            action = action + self.network.log_std.exp() * next(self.noise).to(action)
        self.seen.append(x.cpu())
        if last is not None:
            hidden = torch.where(self._column(last["alive"]) > 0, hidden, memory["hidden"])
        self.memory = memory | {"hidden": hidden}
        self.executed(action)
        return action.cpu().numpy()

    def executed(self, action: torch.Tensor) -> None:
        """Remember the actions (B, act) that are executed, as the environment clips them."""
        self.memory = self.memory | {"action": action.to(self.memory["action"]).clamp(-1.0, 1.0)}

    def update(self, episodes: dict) -> None:
        """Take in the end of every episode: its last action and reward, and that it is over.

        After the last episode of a trial nothing more is remembered, with after_trial "hold".
        """
        self.episode += 1
        if self.settings.after_trial == "hold" and self.episode >= self.settings.trial_episodes:
            self.memory = self.held
            return
        row, end = np.arange(len(episodes["mask"])), episodes["mask"].sum(1).astype(int) - 1
        self.executed(torch.as_tensor(episodes["actions"][row, end]))
        self.memory = self.memory | {"reward": self._column(episodes["rewards"][row, end]),
                                     "ended": torch.ones_like(self.memory["ended"])}
        self.held = self.memory

    def _column(self, values: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.float32, device=self.device)[:, None]


# ---------------------------------------------------------------- trials on the training tasks
def play_trials(agent: Adapter, problem, settings: Settings, generator: torch.Generator,
                acts: list) -> Iterator[tuple[dict, dict]]:
    """`settings.trials` on each training task, side by side. `acts`: who acts, in each episode.

    Yields after every episode what a learner needs of its steps, and the result of `envs.rollout`.
    The former are tensors (B, T, ...) on the CPU: "input", what the agent's network saw; "action",
    before the environment clips it; "reward"; "mask"; "start", 1 at the episode's first step.
    """
    agent.begin(len(problem.tasks) * settings.trials, generator)
    for act in acts:
        episodes = problem.rollout(act, problem.tasks, settings.trials)
        steps = {"input": torch.stack(agent.seen, dim=1)}
        steps |= {name: torch.as_tensor(episodes[plural], dtype=torch.float32)
                  for name, plural in (("action", "actions"), ("reward", "rewards"),
                                       ("mask", "mask"))}
        steps["start"] = torch.zeros_like(steps["mask"])
        steps["start"][:, 0] = 1
        agent.update(episodes)
        yield steps, episodes


def joined(parts: list[dict]) -> dict:
    """Episodes (B, T, ...) in time, to trials (B, E * T, ...): visited steps first, in order.

    Where episodes end early, later ones move up. So padding is at a trial's end only, where it
    changes nothing of what comes before, and a GRU needs no mask.
    """
    trials = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}
    order = (trials["mask"] == 0).to(torch.int8).argsort(dim=1, stable=True)
    rows = torch.arange(len(order))[:, None]
    return {name: value[rows, order] for name, value in trials.items()}


def some_trials(trials: dict, which: np.ndarray, device) -> dict:
    """The trials `which`, up to the end of the longest of them."""
    chosen = {name: value[torch.as_tensor(which)] for name, value in trials.items()}
    longest = int(chosen["mask"].sum(1).max())
    return {name: value[:, :longest].to(device) for name, value in chosen.items()}


def mean_over(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of (B, L) over visited steps."""
    return (values * mask).sum() / mask.sum()


# ---------------------------------------------------------------- what training updates
class Learner:
    """Networks ("policy", and perhaps others), their optimiser, random streams, counts."""

    def __init__(self, problem, settings: Settings, networks: dict[str, Network],
                 state: dict | None):
        self.family, self.settings, self.device = problem.family, settings, problem.device
        self.networks = {name: network.to(self.device) for name, network in networks.items()}
        self.optimiser = torch.optim.Adam([{"params": list(network.parameters())}
                                           for network in networks.values()])
        self.iteration, self.env_steps = 0, 0
        if state is not None:
            self.networks["policy"].load_state_dict(state["policy"])
            if (training := state["training"]) is None:  # the state of a finished run
                self.iteration = settings.iterations
                return
            for name, values in training["networks"].items():
                self.networks[name].load_state_dict(values)
            self.optimiser.load_state_dict(copy.deepcopy(training["optimiser"]))
            self.iteration, self.env_steps = training["iteration"], training["env_steps"]

    def begin(self) -> bool:
        """Begin an iteration, with random streams of its own. False: all are done."""
        settings = self.settings
        if self.iteration == settings.iterations:
            return False
        set_rates(self.optimiser, [settings.memory_rate] * len(self.networks),
                  self.iteration / settings.iterations, settings.final_rate)
        self.iteration += 1  # stream 0 draws the initial weights
        self.rng, self.generator = random_streams(settings.seed, "meta-training", self.iteration)
        self.row, self.norm = {"divergences": 0}, 0.0
        return True

    def agent(self) -> Adapter:
        """The policy as it is now: later updates do not reach it."""
        return Adapter(self.policy(), self.family, self.settings, self.device)

    def count(self, number: int, episodes: dict) -> None:
        """Count env steps; note return and distance of a trial's first and last episode."""
        self.env_steps += int(episodes["mask"].sum())
        self.row["divergences"] += int(episodes["diverged"].sum())
        last = self.settings.trial_episodes - 1
        for prefix, wanted in (("", 0), ("adapted_", last)):
            if number == wanted:
                self.row |= return_and_distance(episodes, prefix)

    def minimise(self, loss: torch.Tensor) -> None:
        """One step of Adam on all networks."""
        self.optimiser.zero_grad()
        loss.backward()
        # Each network by itself: they share no parameter.
        self.norm = math.hypot(*(float(torch.nn.utils.clip_grad_norm_(
            network.parameters(), self.settings.memory_clip_norm))
            for network in self.networks.values()))
        if not math.isfinite(self.norm):
            raise FloatingPointError(
                f"the gradient is not finite in iteration {self.iteration}: start anew with a "
                "lower memory_rate or another seed, and another output folder")
        self.optimiser.step()
        with torch.no_grad():
            self.networks["policy"].log_std.clamp_(min=math.log(self.settings.min_std))

    def policy(self) -> dict:
        """What `Adapter` needs."""
        return detached(self.networks["policy"].state_dict())

    def state(self, **more) -> dict:
        """A copy of all that resuming needs. `more` goes into "training"."""
        others = {name: detached(network.state_dict()) for name, network in self.networks.items()
                  if name != "policy"}
        return {"policy": self.policy(), "training": {
            "networks": others, "optimiser": copy.deepcopy(self.optimiser.state_dict()),
            "iteration": self.iteration, "env_steps": self.env_steps, **more}}

    def metrics(self, **more) -> dict:
        """A row of metrics.csv."""
        return self.row | {"iteration": self.iteration, "env_steps": self.env_steps,
                           "progress": self.iteration / self.settings.iterations,
                           "gradient_norm": self.norm, **more}
