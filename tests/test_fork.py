"""What docs/fork.md and README.md promise to somebody who changes things."""
import ast
import os
import re
import subprocess
import sys

import numpy as np
import pytest

import tasks
from baselines import METHODS
from tasks import make_family
from tests.conftest import ARGUMENTS, HERE, result_of, start

FOLDERS = ("", "tasks", "baselines", "tools", "examples", "tests")


def python_files():
    return [path for folder in FOLDERS for path in sorted((HERE / folder).glob("*.py"))]


@pytest.fixture
def point(tmp_path, monkeypatch):
    """The example of docs/fork.md, added as its reader adds it."""
    text = (HERE / "docs" / "fork.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    line = re.search(r'"point": "tasks\.point:(\w+)"', text)
    assert len(code.splitlines()) <= 60
    (tmp_path / "point_of_docs.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(tasks.TASKS, "point", f"point_of_docs:{line[1]}")


def test_the_example_task_runs_through_every_phase(point, tmp_path, capsys):
    """A plain gymnasium environment: steps counted by hand, the same numbers twice."""
    results = []
    for name in ("one", "two"):
        assert start("--task", "point", *ARGUMENTS, "--set=shared_episodes=5",
                     "--out", tmp_path / name) == 0
        results.append(result_of(tmp_path / name) | {"wall_seconds": 0})
    assert results[0] == results[1]
    result, steps = results[0], 20  # of an episode
    assert result["env_steps"]["experts"] == steps * (2 * 2 * 8 + 2 * 3)
    assert result["env_steps"]["meta_training"] == steps * 3 * (5 + 2)
    assert result["env_steps"]["evaluation"] == steps * 2 * ((3 + 1) * 6 + 1 + 1 + 1)
    assert len(result["held_out"][0]["task"]) == 2
    distances = [entry["final_distance"] for entry in result["held_out"]]
    assert np.all(np.isfinite(distances)) and len(set(distances)) > 2
    assert "final distance" in make_family("point").table[0]


def test_the_example_tasks_rewards_are_those_of_its_environment(point):
    """The reward that experts learn from equals what step() pays."""
    family = make_family("point")
    env, rng = family.make_env(), np.random.default_rng(0)
    goal = np.array([0.3, -0.4])
    env.reset(options={"task": goal})
    for action in rng.uniform(-1, 1, (5, 2)):
        _, reward, _, _, info = env.step(action)
        terms = family.reward_terms(info["outcome"], action, goal)
        assert sum(terms.values()) == pytest.approx(reward, abs=1e-12)


def test_example_script_adapts_a_saved_policy(tmp_path):
    """examples/adapt.py, from another folder: two goals, four rounds, and the policy gets nearer.
    """
    done = subprocess.run([sys.executable, HERE / "examples" / "adapt.py"], cwd=tmp_path,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    centimetres = [float(line.split(", ")[-1].split()[0]) for line in done.stdout.splitlines()]
    assert len(centimetres) == 8 and sum(centimetres[-2:]) < sum(centimetres[:2])


# ---------------------------------------------------------------- the layout
def imported(path):
    """Names of the modules that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_imports_go_one_way():
    """No file imports, over any detour, itself."""
    files = {".".join(path.relative_to(HERE).with_suffix("").parts): path
             for path in python_files() if "tests" not in path.parts}
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    below = {name: imported(path) & set(files) - {name} for name, path in files.items()}

    def reach(name, seen):
        for other in below[name] - seen:
            seen.add(other)
            reach(other, seen)
        return seen
    assert not [name for name in files if name in reach(name, set())]
    core = {"advantages", "policy", "settings"}
    assert reach("gmps", set()) <= core, "the core asks nobody"
    assert "tasks.base" in reach("tasks.ant", set())


def test_files_are_short_and_the_root_is_small():
    """At most 400 lines of at most 100 columns; 12 files in the root; README of 1,500 words."""
    for path in python_files():
        lines = path.read_text().splitlines()
        assert len(lines) <= 400, path.name
        assert max(map(len, lines), default=0) <= 100, path.name
    assert len(list(HERE.glob("*.py"))) <= 12
    assert len((HERE / "README.md").read_text().split()) <= 1500


def test_links_and_names_in_the_documents_exist():
    """Every relative link, and every `name` that README's table of the algorithm gives."""
    code = "\n".join(path.read_text() for path in python_files())
    for page in [HERE / "README.md", *(HERE / "docs").glob("*.md")]:
        for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), (page.name, link)
    table = (HERE / "README.md").read_text().split("| step |")[1].split("\n\n")[0]
    names = re.findall(r"`(\w+)`", table)
    assert len(names) >= 12
    for name in names:
        assert re.search(rf"(def|class) {name}\b", code), name
    for method in METHODS.values():
        assert (HERE / f"{method.replace('.', '/')}.py").exists()
