"""MAML with TRPO outside: meta-training by on-policy reinforcement learning of adapted policies.

Sources: [MAML] "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks" (Finn, Abbeel,
Levine 2017, arXiv 1703.03400), Algorithm 3, whose line numbers stand in `train`; [TRPO] "Trust
Region Policy Optimization" (Schulman et al. 2015, arXiv 1502.05477v5); a learned step size for
every parameter as in "Meta-SGD" (Li et al. 2017, arXiv 1707.09835).

It differs from guided meta-policy search in the outer objective: the return of adapted policies
takes the place of the experts' actions. Policy, baseline, advantages, inner step and meta-test are
those of GMPS. There are no experts, so theta starts from random weights. And every outer step needs
new episodes: K of each task before every inner step, and K after the last. It moves theta and alpha
as one vector, within one bound.

Two inner objectives have the same inner gradient: log pi * A [MAML], and pi / pi_old * A (Rothfuss
et al. 2019, arXiv 1810.06784). The outer gradient of the second also knows that another theta would
explore other episodes. It is the default: with the first, the tests' point task gets worse again
after some 20 iterations.

Letters in shapes: m tasks of an iteration, K episodes per task, T steps, B = K * ceil(T /
noise_hold) samples: the steps at which noise is drawn.
"""
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

import gmps
import settings as settings_module
from advantages import policy_gradient_batch
from policy import (
    Actor,
    Params,
    action_std,
    detached,
    init_policy,
    is_convolution,
    learned,
    log_prob,
    mean_action,
    per_task,
)
from settings import one_of, random_streams, within


@dataclass(frozen=True)
class Settings(settings_module.Settings):
    # Settings of GMPS with defaults of their own
    collections: int = within(125, 1, 100_000, "*iterations; each ends with one outer step")
    episodes: int = within(
        20, 2, 10_000, "*K, per task before each inner step, and again after the last")
    meta_batch: int = within(20, 1, 1000, "tasks per iteration, at most all")
    init_std: float = within(1.0, 1e-3, 10.0, "exploration noise at the start")
    noise_hold: int = within(
        1, 1, 1000, "time steps that exploration noise is held for [ours: 8 on the ant]")
    init_step_size: float = within(0.3, 0.0, 10.0, "*alpha at the start [MAML: 0.1]")
    later_steps: float = within(
        0.5, 0.0, 1.0, "*at meta-test, factor on alpha's positive part in untrained steps [MAML]")
    adapt_std: str = one_of("yes", ("yes", "no"), "whether log-std adapts in the inner step")
    # A random policy's rewards are small: a scale that its first episodes fix is soon too small.
    advantage_scale: str = one_of("per task", ("per task", "common"),
                                  "divide advantages by each task's scale, or by one")
    # Its own
    learn_step_sizes: str = one_of(
        "yes", ("yes", "no"), "*whether the outer step moves alpha as well; no [MAML]")
    inner_objective: str = one_of(
        "ratio", ("ratio", "log-likelihood"),
        "*what the outer step differentiates: pi / pi_old * A; log pi * A [MAML]")
    inner_steps: int = within(1, 1, 100, "gradient steps in meta-training, with episodes for each")
    max_kl: float = within(0.01, 1e-8, 10.0, "*bound of an outer step's mean KL [TRPO: 0.01]")
    cg_iterations: int = within(10, 1, 1000, "of conjugate gradient [TRPO: 10]")
    damping: float = within(1e-5, 0.0, 10.0, "added to the Fisher matrix's diagonal")
    backtracks: int = within(15, 1, 1000, "step lengths that the line search tries at most")
    backtrack_ratio: float = within(0.8, 0.01, 0.99, "from one of these lengths to the next")
    on_task = dict(ant=dict(collections=63, noise_hold=8), door=dict(collections=31))


# ---------------------------------------------------------------- the algorithm
def train(problem, settings: Settings, state: dict | None = None) -> Iterator[tuple[dict, dict]]:
    """[MAML] Algorithm 3. Yields (state, metrics) per iteration; `state` resumes from there.

    FloatingPointError when the meta-gradient is no longer finite.
    """
    learner = MetaLearner(problem, settings, state)                               # line 1
    theta, alpha = learner.theta, learner.alpha
    while learner.begin_collection():                                             # 2
        tasks = learner.draw_tasks()                                              # 3
        phi, adaptation = per_task(theta, len(tasks)), []
        for k in range(settings.inner_steps):
            adaptation.append(learner.explore(tasks, phi, None if k else ""))     # 5: D_i
            phi = gmps.inner_step(phi, alpha, adaptation[k], settings, True)      # 6, 7
        after = learner.explore(tasks, phi, "adapted_")                           # 8: D_i'
        learner.step(phi, adaptation, after)                                      # 10
        yield learner.state(), learner.metrics()
    problem.meta_test(Adapter(learner.policy(), problem.family, settings, problem.device))


# ---------------------------------------------------------------- the outer objective
def adapt(theta: Params, alpha: Params, adaptation: list[dict], settings: Settings,
          first_order: bool = False) -> Params:
    """phi_i of the m tasks: theta after an inner step on each batch of `adaptation`, in order.

    Batch k was explored by phi_k, whose log-probabilities it holds: w of the inner loss is 1 until
    theta moves.
    """
    phi = per_task(theta, len(adaptation[0]["mask"]))
    for batch in adaptation:
        log_p = log_prob(phi, batch["features"], batch["action"])
        behaviour = log_p.detach()  # log-likelihood: w stays 1
        if settings.inner_objective == "ratio":
            # GMPS stops the gradient of w = pi_phi / pi_behaviour. This puts it back, for the outer
            # step only: the inner gradient is taken in `own`, which it does not come from.
            behaviour = batch["behaviour_log_prob"] + behaviour - log_p
        own = {name: value.clone() for name, value in phi.items()}
        phi = gmps.inner_step(own, alpha, batch | {"behaviour_log_prob": behaviour}, settings,
                              first_order)
    return phi


def mean_over(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of (m, B) over each task's samples, then over tasks: all tasks count the same."""
    return ((values * mask).sum(-1) / mask.sum(-1)).mean()


def surrogate_loss(phi: Params, batch: dict) -> torch.Tensor:
    """- mean_i mean_t( pi_phi_i / pi_behaviour * A_t ) of the episodes after adaptation.

    [TRPO] Eq. 14, with the advantage in place of Q (section 5), to be minimised.
    """
    log_p = log_prob(phi, batch["features"], batch["action"])
    ratio = ((log_p - batch["behaviour_log_prob"]) * batch["mask"]).exp()
    return -mean_over(ratio * batch["advantage"], batch["mask"])


def mean_kl(old: Params, new: Params, batch: dict) -> torch.Tensor:
    """mean_i mean_s KL(pi_old_i(.|s) || pi_new_i(.|s)): what [TRPO] Eq. 14 bounds.

    Summed over action dimensions, as log-probabilities are: they are independent.
    """
    (mean, std), (new_mean, new_std) = (
        (mean_action(phi, batch["features"]), action_std(phi)) for phi in (old, new))
    squares = (std.square() + (mean - new_mean).square()) / (2 * new_std.square())
    return mean_over(((new_std / std).log() + squares - 0.5).sum(-1), batch["mask"])


# ---------------------------------------------------------------- TRPO
def flat(tensors) -> torch.Tensor:
    """One vector of them all."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


@torch.no_grad()
def place(vector: torch.Tensor, parameters: list[torch.Tensor]) -> None:
    """Write a vector, as of `flat`, into the parameters."""
    parts = vector.split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts):
        parameter.copy_(part.view_as(parameter))


def fisher_product(kl: torch.Tensor, parameters: list[torch.Tensor],
                   damping: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """v -> (F + damping) v, with F the Hessian of `kl` ([TRPO] appendix C.1), without forming F.

    F v is the gradient of (gradient of kl) . v. Where old and new policies are the same, that
    Hessian is the Fisher matrix.
    """
    gradient = flat(torch.autograd.grad(kl, parameters, create_graph=True,
                                        materialize_grads=True))

    def product(vector):
        rows = torch.autograd.grad(gradient @ vector, parameters, retain_graph=True,
                                   materialize_grads=True)
        return flat(rows) + damping * vector
    return product


def conjugate_gradient(product: Callable[[torch.Tensor], torch.Tensor], b: torch.Tensor,
                       iterations: int) -> torch.Tensor:
    """x with product(x) = b, nearly, for a positive definite `product` (Hestenes and Stiefel)."""
    x, residual, direction = torch.zeros_like(b), b.clone(), b.clone()
    size = start = residual @ residual
    for _ in range(iterations):
        if size <= 1e-10 * start:  # solved to 1e-5; also where b is 0
            break
        image = product(direction)
        length = size / (direction @ image)
        x, residual = x + length * direction, residual - length * image
        size, before = residual @ residual, size
        direction = residual + size / before * direction
    return x


def trust_region_step(parameters: list[torch.Tensor], evaluate: Callable,
                      settings: Settings) -> dict:
    """Lower a loss by one step of TRPO that keeps the mean KL within max_kl ([TRPO] appendix C).

    `evaluate(first_order)` gives (loss, kl) at the parameters, kl from the policies at the start;
    differentiable unless `first_order`. If no length of the step lowers the loss within the bound,
    the parameters stay as they were. Returns metrics. FloatingPointError if the gradient is not
    finite.
    """
    loss, kl = evaluate(False)
    gradient = flat(torch.autograd.grad(loss, parameters, retain_graph=True,
                                        materialize_grads=True))
    info = {"gradient_norm": gradient.norm().item(), "improvement": 0.0, "kl": 0.0, "length": 0.0}
    product = fisher_product(kl, parameters, settings.damping)
    direction = conjugate_gradient(product, gradient, settings.cg_iterations)  # s = F^-1 g
    curvature = (direction @ product(direction)).item()                        # s F s
    if not math.isfinite(info["gradient_norm"] + curvature):
        raise FloatingPointError("the meta-gradient is not finite: start anew with a smaller "
                                 "init_step_size or another seed, and another output folder")
    if curvature <= 0:  # the gradient is 0: no episode was better than another
        return info
    # The longest step: to second order its KL, 1/2 beta^2 s F s, is the bound.
    beta = math.sqrt(2 * settings.max_kl / curvature)
    start, loss = flat(parameters).detach(), loss.item()
    for trial in range(settings.backtracks):
        length = settings.backtrack_ratio ** trial
        place(start - length * beta * direction, parameters)
        new_loss, kl = (value.item() for value in evaluate(True))
        if kl <= settings.max_kl and new_loss < loss:  # false, too, if one is not a number
            return info | {"improvement": loss - new_loss, "kl": kl, "length": length}
    place(start, parameters)
    return info


# ---------------------------------------------------------------- what meta-training updates
class MetaLearner(gmps.MetaLearner):
    """theta, alpha, the advantages' scale. `begin_collection` and `count` are those of GMPS."""

    def __init__(self, problem, settings: Settings, state: dict | None = None):
        self.family, self.settings, self.problem = problem.family, settings, problem
        self.device, self.scale = problem.device, None
        self.collection, self.env_steps = 0, 0
        if state is None:
            generator = random_streams(settings.seed, "imitation", 0)[1]  # as GMPS's first weights
            theta = init_policy(self.family, settings, generator)
            alpha = gmps.init_step_sizes(theta, settings)
        else:
            theta, alpha, self.scale = (state["policy"][k] for k in ("theta", "alpha", "scale"))
            training = state["training"] or {"collection": settings.collections, "env_steps": 0}
            self.collection, self.env_steps = training["collection"], training["env_steps"]
        self.theta, self.alpha = ({name: value.to(self.device) for name, value in
                                   detached(part).items()} for part in (theta, alpha))
        # Convolutions keep their random start: no gradient goes through what an actor has seen.
        self.parameters = [v for name, v in self.theta.items() if not is_convolution(name)]
        if settings.learn_step_sizes == "yes":
            self.parameters += learned(self.alpha, settings)
        for parameter in self.parameters:
            parameter.requires_grad_()

    def draw_tasks(self) -> np.ndarray:
        """Random tasks of an iteration, (m, task)."""
        tasks = self.problem.tasks
        return tasks[self.rng.permutation(len(tasks))[:self.settings.meta_batch]]

    def explore(self, tasks: np.ndarray, phi: Params, name: str | None) -> dict:
        """The batch (m, B, ...) of K episodes of pi_phi_i on each task i; `name`: see `count`."""
        actor = Actor(detached(phi), self.family, self.settings, self.generator)
        episodes = self.problem.rollout(actor, tasks, self.settings.episodes)
        self.count(name, episodes)
        batch, self.scale = policy_gradient_batch(actor.explored(episodes), self.settings,
                                                  self.scale, self.device)
        return batch

    def step(self, phi: Params, adaptation: list[dict], after: dict) -> None:
        """TRPO on theta and alpha. pi_phi_i are the policies that explored `after`."""
        settings, old = self.settings, detached(phi)

        def evaluate(first_order):
            new = adapt(self.theta, self.alpha, adaptation, settings, first_order)
            return surrogate_loss(new, after), mean_kl(old, new, after)
        self.row |= trust_region_step(self.parameters, evaluate, settings)

    def policy(self) -> dict:
        """What `Adapter` needs."""
        return {"theta": detached(self.theta), "alpha": detached(self.alpha), "scale": self.scale}

    def state(self) -> dict:
        """A copy of all that resuming needs. TRPO keeps nothing from step to step."""
        return {"policy": self.policy(),
                "training": {"collection": self.collection, "env_steps": self.env_steps}}

    def metrics(self) -> dict:
        """A row of metrics.csv."""
        return self.row | {
            "iteration": self.collection, "env_steps": self.env_steps,
            "progress": self.collection / self.settings.collections,
            "std": action_std(self.theta).mean().item()}


# ---------------------------------------------------------------- meta-test
class Adapter(gmps.Adapter):
    """GMPS's own. Alpha counts in full in as many steps as meta-training took."""

    def step_size(self, k: int, episodes: int) -> Params:
        return gmps.step_sizes(self.alpha, max(0, k + 1 - self.settings.inner_steps), episodes,
                               self.settings)
