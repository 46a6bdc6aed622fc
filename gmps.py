"""Guided meta-policy search: a few policy-gradient steps make a policy imitate a new task's expert.

Source: "Guided Meta-Policy Search", Mendonca, Gupta, Kralev, Abbeel, Levine, Finn (NeurIPS 2019,
arXiv 1904.00956v2). Step numbers are our own, see README. Marks: [release] is the authors' code,
[ours] departs from it (docs/deviations.md).

This file knows no environment and no expert: `problem` (phases.Problem) brings both as callables.
Letters in shapes: n tasks, K episodes per task, T steps, B = K * T samples per task, F features.
Parameters are dicts of tensors (policy.py): `theta` without, `phi` with a leading task axis.
"""
import copy
import math
from collections.abc import Iterator

import numpy as np
import torch

from advantages import policy_gradient_batch
from policy import (
    Actor,
    Params,
    detached,
    explore,
    features,
    init_policy,
    is_convolution,
    log_prob,
    mean_action,
    per_task,
)
from settings import Settings, random_streams


# ---------------------------------------------------------------- the algorithm
def train(problem, settings: Settings, state: dict | None = None) -> Iterator[tuple[dict, dict]]:
    """The algorithm, start to end. Yields (state, metrics); a state given back goes on from there.

    FloatingPointError when the meta-gradient is no longer finite.
    """
    experts = problem.train_experts()                  # 1.  pi*_i of each training task, off-policy
    demonstrations = problem.demonstrate(experts)      # 2.  D*_i: states and the expert's actions
    learner = MetaLearner(problem, demonstrations, settings, state)
    theta, alpha = learner.theta, learner.alpha

    while learner.next_collection():                   # 3.  repeat, with theta_0 <- theta:
        batches = collect(learner, problem)            # 3a. D_i: K rollouts of pi_theta_0 per task
        for _ in range(settings.meta_steps):           # 3b. many steps on the same D_i:
            inner, labels = learner.draw(batches)      #     some tasks, some of their labels
            path = adapt(theta, alpha, inner, settings)             # inner: theta -> phi_i
            loss, info = outer_loss(theta, path, labels, settings)  # outer: phi_i imitates pi*_i
            learner.minimise(loss, info)               #     Adam on theta and alpha
        aggregate(learner, problem, batches, experts)  # 3c. D*_i += what pi_phi_i visits, labelled
        yield learner.state(), learner.metrics()

    # Meta-test. On each new task: K rollouts of pi_phi, then `Adapter.update`, an inner step on
    # their rewards; and again. No expert is asked.
    problem.meta_test(Adapter(learner.policy(), problem.family, settings, problem.device))


# ---------------------------------------------------------------- 3a: rollouts for the inner steps
def collect(learner: "MetaLearner", problem) -> list[dict]:
    """Step 3a: a batch for each inner step.

    The first comes from pi_theta_0 on every task. The others [ours], where meta-training looks
    through further inner steps, come from the policies adapted so far.
    """
    settings, batches = learner.settings, []
    for _ in range(settings.inner_steps):
        phi = current_phi(learner, batches)
        episodes = explore(phi, problem, settings, settings.episodes, learner.generator)
        batches.append(learner.batch(len(batches), episodes, phi))
    return batches


# ---------------------------------------------------------------- 3b, inner: a policy gradient step
def init_step_sizes(theta: Params, settings: Settings) -> Params:
    """alpha: a step size for every element of theta, (S, *shape).

    S is 1 where all inner steps share one alpha, or settings.inner_steps. Convolutions do not adapt
    [release]. The step size of log-std stays 0 [ours]: the outer loss sees mean actions only, and
    left to learn, it would let exploration noise grow while a policy adapts. The noise itself,
    theta's log-std, is meta-learned.
    """
    steps = settings.inner_steps if settings.step_sizes == "per step" else 1
    alpha = {name: torch.full_like(value, settings.init_step_size).repeat(steps, 1, 1)
             for name, value in theta.items() if not is_convolution(name)}
    return alpha | {"log_std": torch.zeros_like(alpha["log_std"])}


def step_sizes(alpha: Params, k: int, settings: Settings) -> Params:
    """alpha of gradient step k = 0, 1, ... Steps past the trained ones build on the last [ours].

    Nothing has taught alpha how far to go there. "shrinking": each later step takes a quarter of
    the one before, since full steps overshoot. "climbing": each takes 0.4 of alpha's positive part,
    which goes on outside the training tasks. About half of the ant's alpha is negative: a map
    learned for the first steps, while later ones are meant to climb.
    """
    later = k + 1 - settings.inner_steps
    if later <= 0:
        return {name: value[min(k, len(value) - 1)] for name, value in alpha.items()}
    if settings.later_steps == "climbing":
        return {name: (0.4 * value[-1]).clamp(min=0) for name, value in alpha.items()}
    return {name: 0.25 ** later * value[-1] for name, value in alpha.items()}


def importance_weights(log_p: torch.Tensor, batch: dict, settings: Settings) -> torch.Tensor:
    """w_t = stopgrad(pi_phi) / pi_behaviour, (n, B): old rollouts count as if phi had made them.

    Exactly 1 at the first meta-step, when phi is the behaviour policy. `max_weight` bounds it
    [ours]: a single sample could outweigh all others, most of all with many action dimensions.
    """
    log_ratio = (log_p.detach() - batch["log_prob"]) * batch["mask"]  # padding cannot overflow
    return log_ratio.exp().clamp(max=settings.max_weight)


def inner_loss(phi: Params, batch: dict, settings: Settings) -> torch.Tensor:
    """(n,): - mean_t( log pi_phi(a_t|s_t) w_t A_t ), the policy-gradient loss of each task."""
    mask, log_p = batch["mask"], log_prob(phi, batch["features"], batch["action"], settings)
    weight = importance_weights(log_p, batch, settings)
    return -(log_p * weight * batch["advantage"] * mask).sum(-1) / mask.sum(-1)


def inner_step(phi: Params, alpha: Params, batch: dict, settings: Settings,
               first_order: bool = False) -> Params:
    """phi_i' = phi_i - alpha * grad loss_i, for all tasks at once, differentiable in phi and alpha.

    Tasks share no entry of phi that adapts, so the gradient of the sum over tasks holds each task's
    own. `first_order` leaves the second derivative out, for where no outer gradient is taken.
    """
    if first_order:
        phi = {name: value.detach().requires_grad_() for name, value in phi.items()}
    loss, adapting = inner_loss(phi, batch, settings).sum(), [phi[name] for name in alpha]
    gradient = torch.autograd.grad(loss, adapting, create_graph=not first_order,
                                   materialize_grads=True)
    return phi | {name: phi[name] - alpha[name] * g for name, g in zip(alpha, gradient)}


def adapt(theta: Params, alpha: Params, batches: list[dict], settings: Settings,
          first_order: bool = False, n: int | None = None) -> list[Params]:
    """[phi_0, phi_1, ...]: theta for each of n tasks, then phi after each inner step."""
    n = len(batches[0]["mask"]) if n is None else n
    path = [{name: value.clone() for name, value in per_task(theta, n).items()}]
    for k, batch in enumerate(batches):
        path.append(inner_step(path[-1], step_sizes(alpha, k, settings), batch, settings,
                               first_order))
    return path


def current_phi(learner: "MetaLearner", batches: list[dict]) -> Params:
    """phi after one inner step per batch, as plain numbers: for rollouts."""
    return detached(adapt(learner.theta, learner.alpha, batches, learner.settings,
                          first_order=True, n=learner.n)[-1])


# ---------------------------------------------------------------- 3b, outer: imitate the expert
def leaky_clip(action: torch.Tensor) -> torch.Tensor:
    """An action as the environment executes it, clipped to [-1, 1]; slope 0.1 outside.

    The slope leaves a gradient that leads back.
    """
    inside = action.clamp(-1.0, 1.0)
    return inside + 0.1 * (action - inside)


def imitation_loss(phi: Params, x: torch.Tensor, expert_action: torch.Tensor) -> torch.Tensor:
    """mean_i mean_s || mean of pi_phi_i(s) - a* ||^2, for x (n, B, F), expert_action (n, B, act).

    The mean is clipped [ours]. Most expert actions are at full speed, and a mean of 1.2 is hardly
    worse than 1.
    """
    return (leaky_clip(mean_action(phi, x)) - expert_action).square().sum(-1).mean()


def outer_loss(theta: Params, path: list[Params], labels: dict,
               settings: Settings) -> tuple[torch.Tensor, dict]:
    """The meta-objective: imitation after adaptation, averaged over phi_1, phi_2, ...

    `path` is that of `adapt`. `labels`: {"adapted": (x, a*)} of the same tasks. [ours] A share of
    the same loss is on phi_0: the paper's objective gives the pre-update policy no credit for what
    its rollouts show. It imitates the same labels or, if given, those of "pre_update".
    """
    losses = [imitation_loss(phi, *labels["adapted"]) for phi in path]
    if "pre_update" in labels:
        x, expert_action = labels["pre_update"]
        losses[0] = imitation_loss(per_task(theta, len(x)), x, expert_action)
    loss = sum(losses[1:]) / (len(path) - 1) + settings.pre_update_imitation * losses[0]
    return loss, {f"imitation_{k}": value.detach() for k, value in enumerate(losses)}


# ---------------------------------------------------------------- 3c: aggregation
def aggregate(learner: "MetaLearner", problem, batches: list[dict], experts) -> None:
    """Step 3c: roll out pi_phi_i, label the visited states with pi*_i, add them to D*_i.

    phi_i is that of the new theta, adapted on the same D_i. Without an expert to ask, nothing
    happens.
    """
    settings = learner.settings
    if experts is None or settings.aggregation_episodes == 0:
        return
    episodes = explore(current_phi(learner, batches), problem, settings,
                       settings.aggregation_episodes, learner.generator)
    learner.count("adapted_", episodes)
    learner.demonstrations.add_visited(episodes, experts, problem.tasks)


# ---------------------------------------------------------------- where meta-training starts
def imitate(family, demonstrations, settings: Settings, device="cpu", last: int = 0) -> Params:
    """theta of one policy that imitates all experts at once, without adaptation.

    It is the baseline "no adaptation". Meta-training starts from such a policy [ours]: its rollouts
    reach the block. `last`: imitate the experts of the last so many tasks only.
    """
    rng, generator = random_streams(settings.seed, "imitation", 0)
    theta = {name: value.to(device).requires_grad_()
             for name, value in init_policy(family, settings, generator).items()}
    optimiser = torch.optim.Adam(theta.values(), lr=settings.learning_rate)
    n = len(demonstrations.actions)
    tasks = np.arange(n - last if last else 0, n)
    count = settings.imitation_batch * n // len(tasks)  # as many labels for few tasks as for all
    for step in range(settings.imitation_steps):
        set_rates(optimiser, [settings.learning_rate], step / settings.imitation_steps, final=0.0)
        observation, action, *image = demonstrations.sample(family, rng, tasks, count, device)
        x = features(theta, observation, *image)
        loss = imitation_loss(per_task(theta, len(tasks)), x, action)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return detached(theta)


def set_rates(optimiser, rates: list[float], progress: float, final: float = 0.1) -> None:
    """Learning rates fall linearly to `final` of their start as `progress` goes from 0 to 1."""
    for group, rate in zip(optimiser.param_groups, rates):
        group["lr"] = rate * (1.0 - (1.0 - final) * progress)


class MetaLearner:
    """What goes on behind the algorithm: theta, alpha, Adam, advantage scales, streams, counts."""

    def __init__(self, problem, demonstrations, settings: Settings, state: dict | None = None):
        self.family, self.settings, self.demonstrations = problem.family, settings, demonstrations
        self.device, self.n = problem.device, len(problem.tasks)
        self.given = demonstrations.actions.shape[1]  # labelled states per task before step 3c
        self.scales, self.collection, self.env_steps = [], 0, 0
        pre_update = min(settings.pre_update_tasks, self.n)
        self.pre_update_tasks = np.arange(self.n - pre_update, self.n)
        if state is None:
            self.no_adaptation = imitate(self.family, demonstrations, settings, self.device)
            theta = self.no_adaptation
            if pre_update:
                theta = imitate(self.family, demonstrations, settings, self.device, pre_update)
            alpha = init_step_sizes(theta, settings)
        else:
            theta, alpha = state["policy"]["theta"], state["policy"]["alpha"]
            self.no_adaptation = state["policy"]["no_adaptation"]
            self.scales = list(state["policy"]["scales"])
        self.theta, self.alpha = (
            {name: value.to(self.device).requires_grad_() for name, value in detached(part).items()}
            for part in (theta, alpha))
        self.alpha["log_std"].requires_grad_(False)  # see init_step_sizes
        self.optimiser = torch.optim.Adam([{"params": list(self.theta.values())},
                                           {"params": list(self.alpha.values())}])
        training = None if state is None else state["training"]
        if training is not None:
            self.optimiser.load_state_dict(copy.deepcopy(training["optimiser"]))
            self.collection, self.env_steps = training["collection"], training["env_steps"]
            demonstrations.add(*(part.numpy() for part in training["aggregated"]))
        elif state is not None:  # that of a finished run
            self.collection = settings.collections
        if demonstrations.images is not None:  # convolutions learn no more [ours]: look once
            demonstrations.freeze_images(self.family, self.theta)

    def next_collection(self) -> bool:
        """Begin a collection, with random streams of its own. False: all are done."""
        if self.collection == self.settings.collections:
            return False
        self.rng, self.generator = random_streams(self.settings.seed, "meta-training",
                                                  self.collection)
        self.collection += 1
        self.meta_step, self.row = 0, {"divergences": 0}
        return True

    def batch(self, k: int, episodes: dict, phi: Params) -> dict:
        """The batch of inner step k. The first one with any reward fixes its scale for good."""
        fixed = self.scales[k] if k < len(self.scales) else None
        batch, scale = policy_gradient_batch(episodes, phi, self.family, self.settings, fixed)
        self.scales[k:k + 1] = [scale]
        self.count("" if k == 0 else None, episodes)
        return batch

    def count(self, name: str | None, episodes: dict) -> None:
        """Count steps; a name, the start of their columns, puts these episodes into the metrics."""
        self.env_steps += int(episodes["mask"].sum())
        self.row["divergences"] += int(episodes["diverged"].sum())
        if name is not None:
            self.row[f"{name}return"] = float(episodes["rewards"].sum(1).mean())
            self.row[f"{name}distance"] = float(episodes["distances"][:, -1].mean())

    def draw(self, batches: list[dict]) -> tuple[list[dict], dict]:
        """Of one meta-step: the inner batches of some tasks, and labels for the outer loss."""
        some = self.rng.permutation(self.n)[:self.settings.meta_batch]

        def labels(tasks):
            return self.demonstrations.sample(self.family, self.rng, tasks,
                                              self.settings.imitation_batch, self.device)
        drawn = {"adapted": labels(some)}
        if len(self.pre_update_tasks):
            drawn["pre_update"] = labels(self.pre_update_tasks)
        self.inner = [{name: value[some] for name, value in batch.items()} for batch in batches]
        return self.inner, drawn

    def minimise(self, loss: torch.Tensor, info: dict) -> None:
        """One step of Adam on theta and alpha."""
        self.info, settings = info, self.settings
        step = (self.collection - 1) * settings.meta_steps + self.meta_step
        # Adam's first steps have full size whatever the gradient, hence the warm-up [ours].
        warm = min(1.0, (step + 1) / settings.warm_up_steps)
        set_rates(self.optimiser, [settings.learning_rate * warm,
                                   settings.step_size_learning_rate * warm],
                  step / (settings.collections * settings.meta_steps))
        self.optimiser.zero_grad()
        loss.backward()
        params = [p for p in (*self.theta.values(), *self.alpha.values()) if p.grad is not None]
        self.norm = torch.nn.utils.clip_grad_norm_(params, settings.clip_norm)
        if not torch.isfinite(self.norm):
            raise FloatingPointError(
                f"the meta-gradient is not finite in collection {self.collection}: start anew "
                "with a lower learning_rate or another seed, and another output folder")
        self.optimiser.step()
        with torch.no_grad():  # below the floor log-std would have no gradient to come back by
            self.theta["log_std"].clamp_(min=math.log(settings.min_std))
        self.meta_step += 1

    def policy(self) -> dict:
        """What `Adapter` needs."""
        return {"theta": detached(self.theta), "alpha": detached(self.alpha),
                "scales": list(self.scales), "no_adaptation": detached(self.no_adaptation)}

    def state(self) -> dict:
        """Everything to go on from; later steps do not change it."""
        return {"policy": self.policy(), "training": {
            "optimiser": copy.deepcopy(self.optimiser.state_dict()),
            "collection": self.collection, "env_steps": self.env_steps,
            "aggregated": [torch.as_tensor(part[:, self.given:].copy()) for part in
                           (self.demonstrations.observations, self.demonstrations.actions,
                            self.demonstrations.mask)]}}

    def metrics(self) -> dict:
        """A row of metrics.csv. Losses are those of the last meta-step, w is that after it."""
        path = adapt(self.theta, self.alpha, self.inner, self.settings, first_order=True)
        with torch.no_grad():
            weight = torch.cat([importance_weights(
                log_prob(phi, batch["features"], batch["action"], self.settings), batch,
                self.settings)[batch["mask"] > 0] for phi, batch in zip(path, self.inner)])
        return self.row | {
            "iteration": self.collection, "env_steps": self.env_steps,
            "progress": self.collection / self.settings.collections,
            "gradient_norm": float(self.norm), "weight_mean": float(weight.mean()),
            "weight_max": float(weight.max()),
            **{name: float(value) for name, value in self.info.items()}}


# ---------------------------------------------------------------- meta-test
class Adapter:
    """Adapts to new tasks by policy-gradient steps on their rewards alone.

    The contract of every method's adapter is in baselines/__init__.py.
    """
    sequential = False  # the K episodes of a round may run side by side

    def __init__(self, policy: dict, family, settings: Settings, device="cpu"):
        self.theta, self.alpha = ({name: value.to(device) for name, value in policy[key].items()}
                                  for key in ("theta", "alpha"))
        self.scales, self.family, self.settings = policy["scales"], family, settings
        start = policy.get("no_adaptation")
        self.references = {} if start is None else {"no_adaptation": Adapter(
            policy | {"theta": start, "no_adaptation": None}, family, settings, device)}

    def step_size(self, k: int) -> Params:
        """alpha of gradient step k."""
        return step_sizes(self.alpha, k, self.settings)

    def begin(self, count: int, generator: torch.Generator) -> None:
        """Forget all; `count` new tasks follow."""
        self.steps, self.generator = 0, generator
        self.actor = Actor(per_task(self.theta, count), self.family, self.settings, generator)

    def act(self, observation, last: dict | None = None, explore: bool = True) -> np.ndarray:
        """Actions (count * K, act)."""
        return self.actor(observation, last, explore)

    def update(self, episodes: dict) -> None:
        """One inner step on the episodes that `act` explored."""
        phi, k = self.actor.phi, self.steps
        batch, _ = policy_gradient_batch(self.actor.with_features(episodes), phi, self.family,
                                         self.settings, self.scales[min(k, len(self.scales) - 1)])
        phi = inner_step(phi, self.step_size(k), batch, self.settings, first_order=True)
        self.steps += 1
        self.actor = Actor(detached(phi), self.family, self.settings, self.generator)
