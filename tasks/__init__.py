"""Task families by the name that --task takes. A new one is a file here and one line below.

docs/fork.md shows how; the contract is tasks/base.py.
"""
import importlib

from tasks import rendering  # noqa: F401  picks the OpenGL library before MuJoCo is imported

TASKS = {
    "push": "tasks.sawyer_push:SawyerPush",
    "ant": "tasks.ant:AntGoal",
    "door": "tasks.sawyer_door:SawyerDoor",
    "push-vision": "tasks.push_vision:SawyerPushVision",
}


def load(name: str) -> type:
    """The class of a task family, imported when it is first asked for. KeyError if unknown."""
    module, _, attribute = TASKS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
