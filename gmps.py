"""Guided meta-policy search: meta-train a policy that adapts to a new task in a few gradient steps.

Source: "Guided Meta-Policy Search", Mendonca, Gupta, Kralev, Abbeel, Levine, Finn (NeurIPS 2019,
arXiv 1904.00956v2). Step numbers are our own, see README. Marks, here and in all files:
[release] is the authors' code, [ours] departs from it (docs/deviations.md).

This file knows no environment and no expert: `problem` (phases.Problem) brings both as callables.
Letters in shapes: n tasks, K episodes per task, T steps, B samples per task, F features.
Parameters are dicts of tensors (policy.py): `theta` without, `phi` with a leading task axis.
"""
import copy
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from advantages import (
    draw_episodes,
    for_all_tasks,
    policy_gradient_batch,
    return_and_distance,
)
from policy import (
    Actor,
    Params,
    detached,
    imitate,
    imitation_loss,
    is_convolution,
    learned,
    log_prob,
    per_task,
    set_rates,
)
from settings import Settings, random_streams


# ---------------------------------------------------------------- the algorithm
def train(problem, settings: Settings, state: dict | None = None) -> Iterator[tuple[dict, dict]]:
    """The whole algorithm. Yields (state, metrics) per collection; `state` resumes from there.

    FloatingPointError when the meta-gradient is no longer finite.
    """
    # 1. Learn an expert pi*_i for each training task, off-policy.
    experts = problem.train_experts()
    # 2. D*_i: states that pi*_i visits, and its actions there.
    demonstrations = problem.demonstrate(experts)
    # theta starts from imitation of the experts without adaptation [ours].
    learner = MetaLearner(problem, demonstrations, settings, state)
    theta, alpha = learner.theta, learner.alpha
    # 3. Repeat, with theta_0 <- theta:
    while learner.begin_collection():
        # 3a. D_i: episodes of pi_theta_0 for each task.
        collected = collect(learner, problem)
        # 3b. Many meta-steps on the same D_i, each on some of the tasks.
        for _ in range(settings.meta_steps):
            meta_batch, labels = learner.sample(collected, demonstrations)
            phi = adapt(theta, alpha, meta_batch, settings)        # inner: theta -> phi_i on D_i
            loss, info = outer_loss(theta, phi, labels, settings)  # outer: phi_i imitates D*_i
            learner.minimise(loss, info)                           # Adam on theta and alpha
        # 3c. Roll out pi_phi_i, label the visited states with pi*_i, add them to D*_i.
        aggregate(learner, problem, collected, demonstrations, experts)
        yield learner.state(), learner.metrics()
    # Meta-test. On each new task, in rounds: `test_episodes` episodes of pi_phi, then an inner step
    # on their rewards (`Adapter.update`). No expert is asked.
    problem.meta_test(Adapter(learner.policy(), problem.family, settings, problem.device))


# ---------------------------------------------------------------- 3a: rollouts for the inner step
def collect(learner: "MetaLearner", problem) -> dict:
    """Step 3a: D_i of all tasks, tensors (n, episodes, T, ...), from pi_theta_0.

    Of shared episodes only "reward" has n; all else has 1 in its place.
    "behaviour_log_prob" is all that must be kept of theta_0.

    [ours] With `shared_episodes` all tasks share their episodes. pi_theta_0 is the same on every
    task, and so are the dynamics. A task changes only the rewards, and meta-training knows the
    reward function.
    """
    settings, family = learner.settings, problem.family
    shared = settings.shared_episodes if family.outcome_size else 0
    count = 1 if shared else settings.episodes
    tasks = np.resize(problem.tasks, (shared, family.task_size)) if shared else problem.tasks
    phi = per_task(detached(learner.theta), 1 if shared else learner.n)
    actor = Actor(phi, family, settings, learner.generator)
    episodes = problem.rollout(actor, tasks, count)
    learner.count("", episodes)
    explored = actor.explored(episodes)
    if shared:
        explored = for_all_tasks(explored, episodes, family, problem.tasks)
    return explored


# ---------------------------------------------------------------- 3b, inner: a policy gradient step
def init_step_sizes(theta: Params, settings: Settings) -> Params:
    """alpha: a step size for every element of theta that adapts.

    Convolutions do not [release]. With adapt_std "no" log-std does not either [ours], and its
    step size is 0: the outer loss sees mean actions only, so nothing would stop the noise's growth.
    """
    alpha = {name: torch.full_like(value, settings.init_step_size)
             for name, value in theta.items() if not is_convolution(name)}
    if settings.adapt_std == "no":
        alpha["log_std"] = torch.zeros_like(alpha["log_std"])
    return alpha


def step_sizes(alpha: Params, k: int, episodes: int, settings: Settings) -> Params:
    """alpha of gradient step k = 0, 1, ... that rests on so many `episodes` of each task.

    Meta-training takes one step. At meta-test the release goes on with the same alpha. Full steps
    overshoot there, so later ones are shorter [ours]: `later_steps` times alpha. With fewer
    episodes than `test_episodes` the gradient is noisier, so alpha is also multiplied by
    sqrt(episodes / test_episodes). Negative entries of alpha are set to 0: they go against the
    reward's gradient, which can help in the first step only. With `later_steps` 1 alpha stays as
    it is [release].
    """
    if k == 0 or settings.later_steps == 1:
        return alpha
    factor = settings.later_steps * min(1.0, episodes / settings.test_episodes) ** 0.5
    return {name: (factor * value).clamp(min=0) for name, value in alpha.items()}


def importance_weights(log_p: torch.Tensor, batch: dict, settings: Settings) -> torch.Tensor:
    """w_t = stopgrad(pi_phi) / pi_behaviour, (n, B): the importance weight of each time step.

    pi_behaviour is the policy that acted. At the first meta-step it equals pi_phi, and w is 1.
    `max_weight` bounds w [ours]: else a single sample can outweigh all others.
    """
    log_ratio = log_p.detach() - batch["behaviour_log_prob"]
    return (log_ratio * batch["mask"]).exp().clamp(max=settings.max_weight)


def inner_loss(phi: Params, batch: dict, settings: Settings) -> torch.Tensor:
    """(n,): - mean_t( log pi_phi(a_t|s_t) w_t A_t ), the policy-gradient loss of each task."""
    mask, log_p = batch["mask"], log_prob(phi, batch["features"], batch["action"])
    weight = importance_weights(log_p, batch, settings)
    return -(log_p * weight * batch["advantage"] * mask).sum(-1) / mask.sum(-1)


def inner_step(phi: Params, alpha: Params, batch: dict, settings: Settings,
               first_order: bool = False) -> Params:
    """phi_i' = phi_i - alpha * grad loss_i, for all tasks at once, differentiable in phi and alpha.

    Tasks share no adapting entry of phi, so the gradient of the summed loss is each task's own.
    `first_order` drops second derivatives, for calls that no outer gradient goes through.
    """
    if first_order:
        phi = {name: value.detach().requires_grad_() for name, value in phi.items()}
    loss, adapting = inner_loss(phi, batch, settings).sum(), [phi[name] for name in alpha]
    gradient = torch.autograd.grad(loss, adapting, create_graph=not first_order,
                                   materialize_grads=True)
    return phi | {name: phi[name] - alpha[name] * g for name, g in zip(alpha, gradient)}


def adapt(theta: Params, alpha: Params, batch: dict, settings: Settings,
          first_order: bool = False) -> Params:
    """phi_i, theta after one inner step, for each of the n tasks of the batch."""
    phi = {name: value.clone() for name, value in per_task(theta, len(batch["mask"])).items()}
    return inner_step(phi, alpha, batch, settings, first_order)


# ---------------------------------------------------------------- 3b, outer: imitate the expert
def outer_loss(theta: Params, phi: Params, labels: dict,
               settings: Settings) -> tuple[torch.Tensor, dict]:
    """The meta-objective: pi_phi_i imitates expert i.

    `labels["adapted"]` = (x, a*) of phi's tasks. [ours] The loss of theta itself is added with a
    weight: the paper's objective has no gradient that improves what theta's episodes visit. theta
    imitates the same labels or, if given, those of "pre_update" (other tasks).
    """
    after = imitation_loss(phi, *labels["adapted"], settings)
    x, expert_action = labels.get("pre_update", labels["adapted"])
    before = imitation_loss(per_task(theta, len(x)), x, expert_action, settings)
    loss = after + settings.pre_update_imitation * before
    return loss, {"imitation_0": before.detach(), "imitation_1": after.detach()}


# ---------------------------------------------------------------- 3c: aggregation
def aggregate(learner: "MetaLearner", problem, collected, demonstrations, experts) -> None:
    """Step 3c: roll out pi_phi_i, label the visited states with pi*_i, add them to D*_i.

    phi_i is adapted from the new theta on the same D_i. Without an expert, D*_i stays as it is.
    """
    settings = learner.settings
    if experts is None or settings.aggregation_episodes == 0:
        return
    batch = learner.batch(collected, np.arange(learner.n))
    phi = adapt(learner.theta, learner.alpha, batch, settings, first_order=True)
    actor = Actor(detached(phi), problem.family, settings, learner.generator)
    episodes = problem.rollout(actor, problem.tasks, settings.aggregation_episodes)
    learner.count("adapted_", episodes)
    inputs = actor.explored(episodes)["features"]
    demonstrations.add_visited(inputs, episodes, experts, problem.tasks)


# ---------------------------------------------------------------- what meta-training updates
class MetaLearner:
    """What `train` updates: theta, alpha, Adam, the advantages' scale; random streams, counts."""

    def __init__(self, problem, demonstrations, settings: Settings, state: dict | None = None):
        self.family, self.settings, self.demonstrations = problem.family, settings, demonstrations
        self.device, self.n = problem.device, len(problem.tasks)
        self.given = demonstrations.actions.shape[1]  # labelled states per task before step 3c
        self.scale, self.collection, self.env_steps = None, 0, 0
        pre_update = min(settings.pre_update_tasks, self.n)
        self.pre_update_indices = np.arange(self.n - pre_update, self.n)
        if state is None:
            self.no_adaptation = imitate(self.family, demonstrations, settings, self.device)
            theta = self.no_adaptation
            if pre_update:
                theta = imitate(self.family, demonstrations, settings, self.device, pre_update)
            alpha = init_step_sizes(theta, settings)
        else:
            theta, alpha = state["policy"]["theta"], state["policy"]["alpha"]
            self.no_adaptation = state["policy"]["no_adaptation"]
            self.scale = state["policy"]["scale"]
        self.theta, self.alpha = (
            {name: value.to(self.device).requires_grad_() for name, value in detached(part).items()}
            for part in (theta, alpha))
        self.optimiser = torch.optim.Adam(
            [{"params": learned(part, settings)} for part in (self.theta, self.alpha)])
        demonstrations.freeze(self.family, self.theta)  # convolutions are fixed [ours]: run once
        training = None if state is None else state["training"]
        if training is not None:
            self.optimiser.load_state_dict(copy.deepcopy(training["optimiser"]))
            self.collection, self.env_steps = training["collection"], training["env_steps"]
            inputs, actions, mask = training["aggregated"]
            demonstrations.add(inputs, actions.numpy(), mask.numpy())
        elif state is not None:  # the state of a finished run
            self.collection = settings.collections

    def begin_collection(self) -> bool:
        """Begin a collection, with random streams of its own. False: all are done."""
        if self.collection == self.settings.collections:
            return False
        self.rng, self.generator = random_streams(self.settings.seed, "meta-training",
                                                  self.collection)
        self.collection += 1
        self.meta_step, self.row = 0, {"divergences": 0}
        return True

    def batch(self, collected: dict, some: np.ndarray) -> dict:
        """The inner step's batch of the tasks `some`, from K random episodes of each.

        The first non-zero advantages fix their scale for the run.
        """
        episodes = draw_episodes(collected, some, self.settings.episodes, self.rng)
        batch, self.scale = policy_gradient_batch(episodes, self.settings, self.scale,
                                                  self.device)
        return batch

    def count(self, name: str | None, episodes: dict) -> None:
        """Count env steps. With a name, note return and distance in columns that start with it."""
        self.env_steps += int(episodes["mask"].sum())
        self.row["divergences"] += int(episodes["diverged"].sum())
        if name is not None:
            self.row |= return_and_distance(episodes, name)

    def sample(self, collected: dict, demonstrations) -> tuple[dict, dict]:
        """A meta-batch of random tasks: their inner batch, and labels for the outer loss."""
        some = self.rng.permutation(self.n)[:self.settings.meta_batch]

        def labels(tasks):
            return demonstrations.sample(self.family, self.rng, tasks,
                                         self.settings.imitation_batch, self.device)
        sampled = {"adapted": labels(some)}
        if len(self.pre_update_indices):
            sampled["pre_update"] = labels(self.pre_update_indices)
        self.latest_batch = self.batch(collected, some)
        return self.latest_batch, sampled

    def minimise(self, loss: torch.Tensor, info: dict) -> None:
        """One step of Adam on theta and alpha."""
        self.info, settings = info, self.settings
        step = (self.collection - 1) * settings.meta_steps + self.meta_step
        set_rates(self.optimiser, [settings.learning_rate, settings.step_size_learning_rate],
                  step / (settings.collections * settings.meta_steps), settings.final_rate)
        params = [p for group in self.optimiser.param_groups for p in group["params"]]
        self.optimiser.zero_grad()
        loss.backward(inputs=params)
        self.norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        if not torch.isfinite(self.norm):
            raise FloatingPointError(
                f"the meta-gradient is not finite in collection {self.collection}: start anew "
                "with a lower learning_rate or another seed, and another output folder")
        self.optimiser.step()
        self.meta_step += 1

    def policy(self) -> dict:
        """What `Adapter` needs."""
        return {"theta": detached(self.theta), "alpha": detached(self.alpha),
                "scale": self.scale, "no_adaptation": detached(self.no_adaptation)}

    def state(self) -> dict:
        """A copy of all that resuming needs."""
        return {"policy": self.policy(), "training": {
            "optimiser": copy.deepcopy(self.optimiser.state_dict()),
            "collection": self.collection, "env_steps": self.env_steps,
            "aggregated": self.demonstrations.added(self.given)}}

    def metrics(self) -> dict:
        """A row of metrics.csv: losses of the last meta-step, and w after that step."""
        batch = self.latest_batch
        with torch.no_grad():
            log_p = log_prob(per_task(self.theta, len(batch["mask"])), batch["features"],
                             batch["action"])
            weight = importance_weights(log_p, batch, self.settings)[batch["mask"] > 0]
        return self.row | {
            "iteration": self.collection, "env_steps": self.env_steps,
            "progress": self.collection / self.settings.collections,
            "gradient_norm": float(self.norm), "weight_mean": float(weight.mean()),
            "weight_max": float(weight.max()),
            **{name: float(value) for name, value in self.info.items()}}


# ---------------------------------------------------------------- meta-test
class Adapter:
    """Policy-gradient steps on the rewards of new tasks (contract: baselines/__init__.py)."""
    sequential = False  # the episodes of a round may run side by side

    def __init__(self, policy: dict, family, settings: Settings, device="cpu"):
        self.theta, self.alpha = ({name: value.to(device) for name, value in policy[key].items()}
                                  for key in ("theta", "alpha"))
        self.scale, self.family = policy["scale"], family
        # Without a scale from meta-training, one for all new tasks would mix what they know.
        self.settings = settings if self.scale else replace(settings, advantage_scale="per task")
        start = policy.get("no_adaptation") if settings.imitation_steps else None
        self.references = {} if start is None else {"no_adaptation": Adapter(
            policy | {"theta": start, "no_adaptation": None}, family, settings, device)}

    def step_size(self, k: int, episodes: int) -> Params:
        """alpha of gradient step k on so many episodes of each task."""
        return step_sizes(self.alpha, k, episodes, self.settings)

    def begin(self, count: int, generator: torch.Generator) -> None:
        """Start again from theta, on `count` new tasks."""
        self.steps, self.generator = 0, generator
        self.actor = Actor(per_task(self.theta, count), self.family, self.settings, generator)

    def act(self, observation, last: dict | None = None, explore: bool = True) -> np.ndarray:
        """Actions (environments, act), ordered by task; each task has equally many."""
        return self.actor(observation, last, explore)

    def update(self, episodes: dict) -> None:
        """One inner step on the episodes that `act` explored."""
        phi, explored = self.actor.phi, self.actor.explored(episodes)
        batch, _ = policy_gradient_batch(explored, self.settings, self.scale, phi["z"].device)
        alpha = self.step_size(self.steps, explored["mask"].shape[1])
        new = inner_step(phi, alpha, batch, self.settings, first_order=True)
        self.steps += 1
        self.actor = Actor(detached(new), self.family, self.settings, self.generator)
