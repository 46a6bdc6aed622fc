"""Guided meta-policy search: the algorithm. Meta-train a policy so that a few policy-gradient steps on a new task's
own rollouts make it imitate that task's expert.

Source: "Guided Meta-Policy Search", Mendonca, Gupta, Kralev, Abbeel, Levine, Finn (NeurIPS 2019, arXiv 1904.00956v2).
Step numbers in `meta_train` are those of the algorithm box in README.md. Constants marked [release] are those of the
authors' code, [ours] deviate from it (README, "Deviations").

Letters in shape comments: n tasks, K episodes per task, T steps, B samples per task. Parameters are dicts of tensors,
`theta` without and `phi` with a leading task axis (policy.py).
"""
import copy
import math

import numpy as np
import torch

from advantages import policy_gradient_batch
from envs import BatchEnv, random_streams
from policy import collect, detached, init_policy, log_prob, per_task, policy_mean, scaled, see, seen, shared


# ---------------------------------------------------------------- inner step: a policy gradient per task
def init_step_sizes(theta, settings):
    """alpha: one step size per element of theta, the same for every inner step or, with settings.step_sizes "per step", one
    for each of them behind a leading axis.

    That of log-std is 0 and stays so [ours]: the outer loss sees mean actions only, and left to learn, it lets the
    exploration noise drift up while a policy adapts. The noise itself, theta's log-std, is meta-learned. Convolutions do not
    adapt [release] and have no step size. All that adapts is a matrix: `of_step` knows the leading axis by it.
    """
    steps = (settings.inner_steps,) if settings.step_sizes == "per step" else ()
    return {name: torch.full_like(value, 0.0 if name == "log_std" else settings.init_step_size).repeat(*steps, 1, 1)
            for name, value in theta.items() if not shared(name)}


def of_step(alpha, k):
    """alpha of inner step k, counted from 0; past the last that it has been learned for, that of the last."""
    return {name: value[min(k, len(value) - 1)] if value.dim() == 3 else value for name, value in alpha.items()}


def inner_loss(phi, batch, settings):
    """(n,): - mean_t log pi_phi(a_t|s_t) w_t A_t, with w_t = stopgrad(pi_phi) / pi_behaviour (paper's step 3b).

    At the first meta-step pi_phi is the behaviour policy, and w is exactly 1. `max_weight` bounds it later on [ours]:
    single samples would outweigh all others, first of all with the ant's eight action dimensions.
    """
    log_probability = log_prob(phi, batch["observation"], batch["action"], settings)
    weight = ((log_probability.detach() - batch["log_prob"]) * batch["mask"]).exp()  # padding cannot overflow
    weight = weight.clamp(max=settings.max_weight)
    return -(log_probability * weight * batch["advantage"] * batch["mask"]).sum(-1) / batch["mask"].sum(-1)


def inner_step(phi, alpha, batch, settings, first_order=False):
    """phi_i' = phi_i - alpha * grad loss_i for all tasks at once; differentiable in phi and alpha.

    Tasks share no entry of `phi` that adapts, so the gradient of the sum over tasks holds each task's own gradient.
    `first_order` cuts the second derivative, where no outer gradient is taken.
    """
    if first_order:
        phi = {name: value.detach().requires_grad_() for name, value in phi.items()}
    gradient = torch.autograd.grad(inner_loss(phi, batch, settings).sum(), [phi[name] for name in alpha],
                                   create_graph=not first_order)
    return phi | {name: phi[name] - alpha[name] * g for name, g in zip(alpha, gradient)}


def adapt(theta, alpha, batches, settings, n, first_order=False):
    """[phi_0, phi_1, ...]: theta for each of n tasks, then after each inner step on `batches[k]`."""
    path = [{name: value.clone() for name, value in per_task(theta, n).items()}]
    for k, batch in enumerate(batches):
        path.append(inner_step(path[-1], of_step(alpha, k), seen(theta, batch), settings, first_order))
    return path


def adapted(theta, alpha, batches, settings, n):
    """phi after one inner step per batch, as plain numbers: for rollouts, not for the outer gradient."""
    path = adapt(detached(theta), detached(alpha), batches, settings, n, first_order=True)
    return detached(path[-1])


# ---------------------------------------------------------------- outer objective: imitation after the inner step
def executed(action):
    """What the environment makes of an action, clip to [-1, 1], with slope 0.1 outside so that a gradient is left."""
    inside = action.clamp(-1.0, 1.0)
    return inside + 0.1 * (action - inside)


def imitation_loss(phi, observation, expert_action):
    """mean_i mean_s || mean of pi_phi_i(s) - a* ||^2; observation (n, B, obs), expert_action (n, B, act).

    The mean is taken as executed [ours]: most expert actions are at full speed, and a mean of 1.2 is no worse than 1.
    """
    return (executed(policy_mean(phi, observation)) - expert_action).square().sum(-1).mean()


def meta_loss(theta, alpha, batches, demonstration, settings, exploration=None):
    """The paper's meta-objective, averaged over the adapted phi_1 ... phi_k, and [ours] a share of it on phi_0.

    `demonstration`: (observation (n, B, obs), expert action (n, B, act)), and images (n, B, ...) where there are any. The
    loss on phi_0 keeps the pre-update policy at the block: the paper's objective gives it no credit for what its rollouts
    show. `exploration`, demonstrations of any number of tasks, are what phi_0 shall imitate instead.
    """
    observation, expert_action, *image = demonstration
    path = adapt(theta, alpha, batches, settings, len(observation))
    observation = see(theta, observation, *image)  # once for all phi: they share the convolutions
    losses = [imitation_loss(phi, observation, expert_action) for phi in path]
    if exploration is not None:
        observation, expert_action, *image = exploration
        losses[0] = imitation_loss(per_task(theta, len(observation)), see(theta, observation, *image), expert_action)
    loss = sum(losses[1:]) / len(batches) + settings.pre_update_imitation * losses[0]
    return loss, {f"imitation_{k}": value.detach() for k, value in enumerate(losses)}


# ---------------------------------------------------------------- demonstrations
class Demonstrations:
    """D*_i: labelled states of each task: arrays (n, M, obs) and (n, M, act), M the same for all tasks; where the policy
    sees images, `observations` are the numbers beside them and `images` (n, M, rows, columns, 3) uint8."""

    def __init__(self, observations, actions, images=None):
        if observations.ndim != 3 or actions.ndim != 3 or observations.shape[:2] != actions.shape[:2]:
            raise ValueError(f"demonstrations need shapes (n, M, obs) and (n, M, act), not {observations.shape} "
                             f"and {actions.shape}")
        if images is not None and images.shape[:2] != actions.shape[:2]:
            raise ValueError(f"demonstrations have {actions.shape[:2]} actions and {images.shape[:2]} images")
        self.observations, self.actions, self.images, self.features = observations, actions, images, None

    @torch.no_grad()
    def keep_features(self, family, theta):
        """From now on `sample` gives what `theta`'s convolutions see in the images: for convolutions that learn no more."""
        device = theta["z"].device
        self.features = see(theta, scaled(family, self.observations).to(device), torch.as_tensor(self.images).to(device))

    def add(self, observations, actions):
        self.observations = np.concatenate([self.observations, observations], axis=1)
        self.actions = np.concatenate([self.actions, actions], axis=1)

    def sample(self, family, generator, tasks, count, device="cpu"):
        """`count` random labelled states of each task index in `tasks` (m,): observation (m, count, obs), scaled, and
        expert action (m, count, act); for a family with images also those, (m, count, rows, columns, 3) uint8."""
        task, index = tasks[:, None], generator.integers(self.observations.shape[1], size=(len(tasks), count))
        action = torch.as_tensor(self.actions[task, index], dtype=torch.float32).to(device)
        if self.features is not None:
            return self.features[torch.as_tensor(task), torch.as_tensor(index)], action
        image = [torch.as_tensor(self.images[task, index]).to(device)] if family.image_shape else []
        return scaled(family, self.observations[task, index]).to(device), action, *image


def imitate(family, demonstrations, settings, device="cpu", last=0):
    """theta of one policy that imitates all experts at once, without adaptation: plain supervised learning.

    It is the baseline "no adaptation", and where meta-training starts from [ours]: its rollouts reach the block. `last`:
    imitate those of the last so many tasks alone.
    """
    rng, generator = random_streams(settings.seed, "imitation", 0)
    theta = {name: value.to(device).requires_grad_() for name, value in init_policy(family, settings, generator).items()}
    optimiser = torch.optim.Adam(theta.values(), lr=settings.learning_rate)
    n = len(demonstrations.observations)
    everyone = np.arange(n - last if last else 0, n)
    for step in range(settings.imitation_steps):
        set_rates(optimiser, [settings.learning_rate], step / settings.imitation_steps, final=0.0)
        observation, action, *image = demonstrations.sample(family, rng, everyone,
                                                            settings.imitation_batch * n // len(everyone), device)
        loss = imitation_loss(per_task(theta, len(everyone)), see(theta, observation, *image), action)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return detached(theta)


# ---------------------------------------------------------------- the algorithm box
def meta_train(env, tasks, demonstrations, experts, theta, settings, state=None, device="cpu"):
    """Step 3; a generator that yields (state, metrics) after every collection.

    `env`: BatchEnv of len(tasks) * settings.episodes environments. `demonstrations`: D* of step 2, grown in place.
    `experts`: callable (observations (n, B, obs), tasks (n, task)) -> actions (n, B, act), or None to learn from the
    demonstrations alone. `theta`: start parameters. `state`: one yielded before, to go on from there with the same bits,
    given the demonstrations of step 2 again, not the grown ones. FloatingPointError when the meta-objective is no longer
    finite.
    """
    family, n = env.family, len(tasks)
    learner = MetaLearner(theta, demonstrations, settings, state, device)
    theta, alpha = learner.theta, learner.alpha
    if learner.fixed_eyes:
        demonstrations.keep_features(family, theta)
    aggregate = experts is not None and settings.aggregation_episodes > 0
    aggregation_env = env.resized(n * settings.aggregation_episodes) if aggregate else None
    explorers = np.arange(n)[n - min(n, settings.exploring_tasks):]

    for collection in range(learner.collection, settings.collections):
        rng, generator = random_streams(settings.seed, "meta-training", collection)

        # 3a. theta_0 <- theta. K trajectories D_i with pi_theta_0 on each task, and with the policies adapted to them
        #     where meta-training looks through further inner steps.
        batches, collected = [], []
        for _ in range(settings.inner_steps):
            phi = adapted(theta, alpha, batches, settings, n)
            collected.append(collect(env, tasks, phi, settings, generator))
            batches.append(learner.batch(len(batches), collected[-1], phi, family))

        # 3b. Many meta-steps on the same D_i: theta, alpha <- Adam on the imitation loss after the inner steps.
        for step in range(settings.meta_steps):
            some = rng.permutation(n)[:settings.meta_batch]
            demonstration = demonstrations.sample(family, rng, some, settings.imitation_batch, device)
            exploration = None
            if len(explorers):
                exploration = demonstrations.sample(family, rng, explorers, settings.imitation_batch, device)
            inner = [some_images(of_tasks(batch, some), rng, settings.image_batch) for batch in batches]
            loss, info = meta_loss(theta, alpha, inner, demonstration, settings, exploration)
            learner.minimise(loss, collection * settings.meta_steps + step)

        # 3c. Aggregation: roll out pi_phi_i on T_i, label the visited states with the experts, add them to D*_i. phi_i is
        #     that of the new theta, adapted on the same D_i. (States after an early end would count as visited again.)
        if aggregate:
            phi = adapted(theta, alpha, batches, settings, n)
            collected.append(collect(aggregation_env, tasks, phi, settings, generator))
            visited = collected[-1]["observations"][:, :-1].reshape(n, -1, family.observation_size)
            demonstrations.add(visited, experts(visited, tasks))

        yield learner.finish(collected), learner.metrics(collected, info)
    if aggregate:
        aggregation_env.close()


class MetaLearner:
    """What meta-training carries from one collection to the next: theta, alpha, Adam, advantage scales, counts.

    `fixed_eyes`, settings.image_batch 0: convolutions see each image once, of demonstrations and rollouts; else `see` looks
    again in every meta-step."""

    def __init__(self, theta, demonstrations, settings, state=None, device="cpu"):
        self.settings, self.demonstrations = settings, demonstrations
        alpha = init_step_sizes(theta, settings)
        self.theta, self.alpha = ({name: value.to(device).requires_grad_() for name, value in detached(params).items()}
                                  for params in (theta, alpha))
        self.alpha["log_std"].requires_grad_(False)
        self.rates = [settings.learning_rate, settings.step_size_learning_rate]
        self.optimiser = torch.optim.Adam([{"params": list(self.theta.values())}, {"params": list(self.alpha.values())}])
        self.scales, self.collection, self.env_steps = [], 0, 0
        self.given = demonstrations.observations.shape[1]  # labelled states per task before any aggregation
        self.fixed_eyes = demonstrations.images is not None and settings.image_batch == 0
        if state is not None:
            with torch.no_grad():
                for own, saved in ((self.theta, state["theta"]), (self.alpha, state["alpha"])):
                    for name in own:
                        own[name].copy_(saved[name])
            self.optimiser.load_state_dict(copy.deepcopy(state["optimiser"]))
            self.scales, self.collection, self.env_steps = list(state["scales"]), state["collection"], state["env_steps"]
            demonstrations.add(state["aggregated_observations"].numpy(), state["aggregated_actions"].numpy())

    def batch(self, k, episodes, phi, family):
        """Batch of inner step k; the first batch of a step with any reward fixes the scale of its advantages for good."""
        fixed = self.scales[k] if k < len(self.scales) else None
        batch, scale = policy_gradient_batch(episodes, phi, family, self.settings, fixed)
        self.scales[k:k + 1] = [scale]
        if self.fixed_eyes:
            with torch.no_grad():
                batch = {name: value for name, value in seen(phi, batch).items() if name != "image"}
        return batch

    def minimise(self, loss, step):
        """Adam's meta-step number `step`. Its first steps have full size whatever the gradient, hence the warm-up."""
        set_rates(self.optimiser, [rate * min(1.0, (step + 1) / self.settings.warm_up_steps) for rate in self.rates],
                  step / (self.settings.collections * self.settings.meta_steps))
        self.optimiser.zero_grad()
        loss.backward()
        params = [p for p in (*self.theta.values(), *self.alpha.values()) if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(params, self.settings.clip_norm)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the meta-gradient is not finite in collection {self.collection + 1}: start anew "
                                     "with a lower learning_rate or another seed, and another output folder")
        self.optimiser.step()
        with torch.no_grad():  # below the floor log-std would have no gradient to come back by
            self.theta["log_std"].clamp_(min=math.log(self.settings.min_std))

    def finish(self, collected):
        """Count a collection; returns the state to go on from."""
        self.collection += 1
        self.env_steps += sum(int(episodes["mask"].sum()) for episodes in collected)
        return {"theta": detached(self.theta), "alpha": detached(self.alpha), "scales": list(self.scales),
                "optimiser": copy.deepcopy(self.optimiser.state_dict()), "collection": self.collection,
                "env_steps": self.env_steps,
                "aggregated_observations": torch.as_tensor(self.demonstrations.observations[:, self.given:].copy()),
                "aggregated_actions": torch.as_tensor(self.demonstrations.actions[:, self.given:].copy())}

    def metrics(self, collected, info):
        """Return and distance of step 3a's first rollouts and, where there are any, of step 3c's adapted ones."""
        metrics = {"iteration": self.collection, "env_steps": self.env_steps}
        rolled = [("", collected[0])] + [("adapted_", collected[-1])] * (len(collected) > self.settings.inner_steps)
        for name, episodes in rolled:
            metrics[f"{name}return"] = float(episodes["rewards"].sum(1).mean())
            metrics[f"{name}distance"] = float(episodes["distances"][:, -1].mean())
        return metrics | {name: float(value) for name, value in info.items()}


def of_tasks(batch, tasks):
    """Those rows of a batch."""
    return {name: value[tasks] for name, value in batch.items()}


def some_images(batch, generator, count):
    """`count` random samples of a batch with images, the same of each task, since a meta-step has not the time to look at
    all of them; any other batch as it is."""
    if "image" not in batch:
        return batch
    chosen = torch.as_tensor(generator.permutation(batch["image"].shape[1])[:count])
    return {name: value[:, chosen.to(value.device)] for name, value in batch.items()}


def set_rates(optimiser, rates, progress, final=0.1):
    """Learning rates fall linearly to `final` of their start as `progress` goes from 0 to 1."""
    for group, rate in zip(optimiser.param_groups, rates):
        group["lr"] = rate * (1.0 - (1.0 - final) * progress)


# ---------------------------------------------------------------- meta-test
def evaluate(family, theta, alpha, scales, tasks, gradient_steps, settings, seed, threads=None, stream=0):
    """Adapt to every task by reward alone, `gradient_steps` policy-gradient steps of settings.episodes rollouts each.

    `tasks` (n, task); `stream` numbers the random stream of `seed` for the rollouts' noise. Returns {"mean": ..,
    "sampled": ..} of {"return", "distance"} arrays (gradient_steps + 1, n), for the mean action (one episode: simulator
    and policy are deterministic) and averaged over the sampled rollouts; "path", the adapted parameters after each
    step; and "env_steps". `scales`: of the advantages, one for each meta-trained step, in units of return (1.0 where each
    task has its own, None where it found no reward). Step k past those uses the last one's scale and step sizes, these times
    max(settings.later_start * settings.later_steps ** k, settings.later_floor). With
    settings.later_alpha "positive" they leave out negative step sizes [ours]: about half of alpha is negative, a map
    learned for the first steps and the training tasks' range, while further steps are meant to climb.
    """
    n = len(tasks)
    env, mean_env = BatchEnv(n * settings.episodes, family, threads), BatchEnv(n, family, threads)
    generator = random_streams(seed, "evaluation", stream)[1]
    phi = per_task(theta, n)
    out = {name: {"return": [], "distance": []} for name in ("mean", "sampled")} | {"path": [], "env_steps": 0}
    for k in range(gradient_steps + 1):
        out["path"].append(phi)
        mean_episodes = collect(mean_env, tasks, phi, settings, None)
        episodes = collect(env, tasks, phi, settings, generator)
        for name, rolled in (("mean", mean_episodes), ("sampled", episodes)):
            out[name]["return"].append(rolled["rewards"].sum(1).reshape(n, -1).mean(1))
            out[name]["distance"].append(rolled["distances"][:, -1].reshape(n, -1).mean(1))
            out["env_steps"] += int(rolled["mask"].sum())
        if k < gradient_steps:
            batch, _ = policy_gradient_batch(episodes, phi, family, settings, scales[min(k, len(scales) - 1)])
            past = max(0, k + 1 - len(scales))  # as many scales as meta-trained steps
            shrink = max(settings.later_start * settings.later_steps ** past, settings.later_floor) if past else 1.0
            step_size = {name: shrink * value for name, value in of_step(alpha, k).items()}
            if past and settings.later_alpha == "positive":
                step_size = {name: value.clamp(min=0) for name, value in step_size.items()}
            phi = detached(inner_step(phi, step_size, seen(phi, batch), settings, first_order=True))
    env.close(), mean_env.close()
    for name in ("mean", "sampled"):
        out[name] = {key: np.array(values) for key, values in out[name].items()}
    return out
