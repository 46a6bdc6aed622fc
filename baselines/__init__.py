"""Methods by the name that --method takes. A new one is a file here and one line below.

A method is a module with two names, and a third if it has settings of its own:

`train(problem, settings, state=None)`
    A generator that trains from start to end. After every collection of rollouts it yields (state,
    metrics). Its last act is `problem.meta_test(Adapter(...))`.
    `problem` is a phases.Problem: family, tasks, device, and the callables train_experts,
    demonstrate, rollout, meta_test. A method that asks no expert pays for none.
    `state` is {"policy": what Adapter needs, "training": what further training needs}: numbers,
    strings, lists, dicts and tensors. Given back, it must make training go on with the same bits.
    The "training" of a finished run is None.
    `metrics` holds "iteration" (collections so far), "progress" (share of training done, 1.0 at
    the end) and "env_steps" (in training so far). "return" and "distance" (sampled, on training
    tasks), "divergences" and more may follow, see phases.COLUMNS.

`Adapter(policy, family, settings, device)`
    Meta-test. evaluate.py gives every method the same tasks and the same number of episodes:
    `begin(count, generator)`: forget all; `count` new tasks follow, never told which. `generator`
        is torch's, for exploration.
    `act(observation, last=None, explore=True)`: actions (B, act) of B environments, by task.
        `last` is None at the first step of episodes, then {"reward": (B,), "alive": (B,)} of the
        step before. With explore=False the mean action, which is what gets measured: on a copy of
        the adapter, so that it may remember what it likes.
    `update(episodes)`: learn from the episodes just explored, a dict of `envs.rollout`.
    `sequential`: False: all K episodes of a round run side by side, and one update follows. True:
        each of a task's K episodes runs after the one before, each followed by an update.
    `references`: {name: Adapter}, measured beside it without any update; usually {}.

`Settings`
    settings.Settings itself, or a subclass with the method's own; --set knows them.
"""
import importlib

METHODS = {
    "gmps": "gmps",
    "multitask": "baselines.multitask",
}


def load(name: str):
    """The module of a method, imported when it is first asked for. ValueError if unknown."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}: choose one of {', '.join(METHODS)}")
    return importlib.import_module(METHODS[name])
