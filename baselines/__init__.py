"""Methods by the name that --method takes. A new one is a file here and one line below.

A method is a module with three names:

`train(problem, settings, state=None)`
    A generator that trains from start to end. After every collection it yields (state, metrics).
    Its last act is `problem.meta_test(Adapter(...))`, which saves the policy that it yielded last.
    `problem` is a phases.Problem: family, tasks (n, task), device, and four callables:
        `train_experts()` -> expert, (n, B, obs), (n, task) -> (n, B, act); or None;
        `demonstrate(expert)` -> local_policies.Demonstrations;
        `rollout(policy, tasks, episodes)` -> arrays as of `envs.rollout`. "observations" have T + 1
        rows and "actions" are unclipped. The expert's labels are `expert(x, tasks)` with x from
        "observations"[:, :-1] ("states" if there are images), reshaped to (n, B, obs);
        `meta_test(adapter)`.
    A method that never calls train_experts trains no experts.
    `state` is {"policy": what Adapter needs, "training": what further training needs}: numbers,
    strings, lists, dicts and tensors (an optimiser's state_dict will do), in copies of their own.
    When `train` gets a state it must continue bit for bit. Take random numbers from
    settings.random_streams(seed, "meta-training", collection). If state["training"] is None,
    training is finished: go straight to meta_test.
    `metrics` holds "iteration" (collections so far), "progress" (share of training done, 1.0 at
    the end) and "env_steps" (the sum of episodes["mask"] so far: the method counts them). More may
    follow: "return" and "distance" (sampled, training tasks), "divergences", see
    checkpoints.COLUMNS.

`Adapter(policy, family, settings, device)`
    Meta-test. evaluate.py gives every method the same tasks and the same number of episodes:
    `begin(count, generator)`: forget everything; `count` new tasks follow, which it is never told.
        `generator` is torch's, for exploration.
    `act(observation, last=None, explore=True)`: actions (B, act) of B environments, ordered by
        task: K in a row for each, or one if sequential or measured. `last` is None at the first
        step of an episode, then {"reward": (B,), "alive": (B,)} of the step before. explore=False:
        the mean action. That is measured on copy.deepcopy(adapter), so memory is not disturbed.
    `update(episodes)`: learn from the episodes just explored, the result of `envs.rollout`. Only
        here a method sees the reward of an episode's last step.
    `sequential`: False: all K episodes of a round run at once, then one update follows. True: each
        task's K episodes run one after the other, each followed by an update.
    `references`: {name: Adapter}, measured as they are, without any update; usually {}.

`Settings`
    settings.Settings itself (import it), or a subclass with further settings for --set. The dict
    `quick` of that class says which of them --quick changes; `on_task`, {task: {name: value}},
    which have another default on a task.
"""
import importlib

from settings import UserError

METHODS = {
    "gmps": "gmps",
    "multitask": "baselines.multitask",
    "maml": "baselines.maml",
    "oracle": "baselines.oracle",
    "regress": "baselines.regress",
    "scratch": "baselines.scratch",
    "rl2": "baselines.rl2",
    "incontext": "baselines.incontext",
    "pearl": "baselines.pearl",
}


def load(name: str):
    """The module of a method, imported when it is first asked for. ValueError if unknown."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}: choose one of {', '.join(METHODS)}")
    return importlib.import_module(METHODS[name])


def refuse_demonstrations(method: str) -> None:
    """UserError for a method that learns from reward alone, and would leave --demos unread."""
    if method in ("maml", "rl2", "pearl", "scratch"):
        raise UserError(f"--method {method} learns from reward alone: leave --demos out")


def refuse_images(family, settings) -> None:
    """For a method whose networks take numbers alone: UserError if the policy would see images."""
    if family.image_shape:
        raise UserError(f"--method {settings.method} sees no images: choose another task than "
                        f"{family.name}")
