"""Tests of what is refused in one clear line: arguments, goals, demonstrations, policies, folders.
"""
import dataclasses
import io
import shutil
import sys
import warnings

import numpy as np
import pytest
import torch

import baselines
import checkpoints
import phases
from checkpoints import load_checkpoint, save_checkpoint
from settings import Settings
from tasks.push_vision import SawyerPushVision
from tests.conftest import ARGUMENTS, refused, result_of, start
from tests.test_checkpoints import EVALUATE, answer_of, timeless
from tools import minari_export


# ---------------------------------------------------------------- arguments and folders
def copied(finished, out, *names):
    out.mkdir()
    for name in names:
        shutil.copy(finished / name, out)
    return out


TRAIN, TEST = " ".join(ARGUMENTS), "--threads 1 --evaluate {finished}"


@pytest.mark.parametrize("arguments, word", [
    ("--task pull", "'pull': choose one of push, ant, door, push-vision, or all"),
    ("--method pull", "'pull': choose one of gmps, multitask"), ("--nonsense", "--nonsense"),
    ("--set method=multitask", "use --method"), ("--set seed=1", "use --seed"),
    ("--set nonsense=1", "nonsense"), ("--set step_size=1", "unknown setting 'step_size'"),
    ("--method multitask --set step_size=-1", "step_size"), ("--set hidden", "hidden"),
    ("--set hidden=0", "hidden"), ("--set hidden=x", "hidden"), ("--experts none", "none"),
    ("--set learning_rate=nan", "learning_rate"), ("--set discount=1.5", "discount"),
    ("--set experts=none", "experts"), ("--device meta", "'meta'"), ("--device cuda:99", "cuda:99"),
    ("--device abacus", "abacus"), ("--seed -1", "--seed"), ("--seed x", "--seed"),
    ("--seed 99999999999", "--seed"), ("--seeds 0", "--seeds"), ("--threads 0", "--threads"),
    ("--seeds 2 --seed 1", "leave --seed out"), ("--out", "--out"), ("--rollouts 0", "--rollouts"),
    ("--rollouts 5", "--rollouts goes with --evaluate"), ("--gradient-steps -1", "gradient-steps"),
    ("--goals goals.npy", "--goals goes with --evaluate"), ("--extrapolate", "--evaluate"),
    ("--task all --demos x.npz", "name one task"), ("--task door --reward dense", "no dense"),
    ("--task door --experts local", "no local experts"),
    ("--demos x.npz --experts local", "leave --experts out"),
    (f"{TRAIN} --out taken", "taken"), (f"{TRAIN} --out taken/below", "taken"),
    (f"{TRAIN} --set hidden=9 --out {{finished}}", "other hidden"),
    (f"{TRAIN} --seed 1 --out {{finished}}", "other seed"),
    (f"{TRAIN} --method multitask --out {{finished}}", "other method"),
    ("--evaluate x", "train first"), (TEST + "/policy.pt", "takes the folder"),
    (TEST + " --task ant", "give --task push"), (TEST + " --set hidden=8", "--set is for training"),
    (TEST + " --extrapolate", "--extrapolate goes with --task ant"),
    (TEST + " --extrapolate --goals x.npy", "leave --goals out"),
    (TEST + " --rollouts 10001", "10000"), (TEST + " --out taken", "taken"),
    (TEST + " --out {finished}", "training run"), (TEST + " --out other", "training run")])
def test_bad_argument_is_refused_in_one_line(finished, tmp_path, capsys, arguments, word):
    """And no file changes. `other` holds another run's result alone, `taken` is a file."""
    (tmp_path / "taken").write_text("mine")
    copied(finished, tmp_path / "other", "result.json")
    before = {path: path.read_bytes() for folder in (finished, tmp_path)
              for path in folder.rglob("*") if path.is_file()}
    assert word in refused(capsys, *(part.format(finished=finished) for part in arguments.split()))
    assert before == {path: path.read_bytes() for path in before}


# ---------------------------------------------------------------- goals and demonstrations
def saved(array, save=np.save, length=None, **options):
    """Writes an array to a path, or the start of that file."""
    def write(path):
        buffer = io.BytesIO()
        save(buffer, array, **options)
        path.write_bytes(buffer.getvalue()[:length])
    return write


@pytest.mark.parametrize("write, word", [
    pytest.param(saved(np.zeros((2, 3))), "(n, 2)", id="wrong shape"),
    pytest.param(saved(np.zeros(2)), "(n, 2)", id="one axis"),
    pytest.param(saved(np.zeros((0, 2))), "(n, 2)", id="empty"),
    pytest.param(saved(np.array([[0, 0.75], [0, np.nan]])), "row 1", id="NaN"),
    pytest.param(saved(np.array([[0, 0.75], [0.5, 0.75]])), "row 1", id="off the table"),
    pytest.param(saved(np.array([["a", "b"]])), "numbers", id="text array"),
    pytest.param(saved(np.array([[0.05 + 1j, 0.75]])), "numbers", id="complex"),
    pytest.param(saved(np.array([[None, 1]]), allow_pickle=True), "no npy", id="pickled objects"),
    pytest.param(lambda path: None, "no goals file", id="missing"),
    pytest.param(lambda path: path.write_text("0.0, 0.75\n"), "no npy", id="text file"),
    pytest.param(lambda path: path.write_bytes(b""), "no npy", id="no bytes"),
    pytest.param(saved(np.zeros((2, 2)), np.savez, 100), "no npy", id="truncated npz"),
    pytest.param(saved(np.zeros((2, 2)), np.savez), "npz archive", id="npz"),
    pytest.param(lambda path: path.mkdir(), "no npy", id="a folder")])
def test_bad_goals_file_is_refused_in_one_line(finished, tmp_path, capsys, write, word):
    write(tmp_path / "goals.npy")
    with warnings.catch_warnings(action="error"):
        line = refused(capsys, *EVALUATE, finished, "--goals", "goals.npy", "--out", "out")
    assert word in line and "goals.npy" in line
    assert not (tmp_path / "out").exists()


def arrays(**changed):
    return {"tasks": np.zeros((2, 2)) + [0, 0.75], "observations": np.zeros((2, 5, 6)),
            "actions": np.zeros((2, 5, 3))} | changed


@pytest.mark.parametrize("content, word", [
    (b"", "npz"), (b"PK\x03\x04 and no more", "npz"), (None, "no demonstrations file"),
    (b"phase,iteration\n", "npz file, and whole"), ({"tasks": np.zeros((2, 2))}, "actions"),
    (arrays(tasks=np.full((2, 2), 9.0)), "out of range"),
    (arrays(tasks=np.zeros((2, 1))), "tasks have"),
    (arrays(observations=np.zeros((2, 0, 6)), actions=np.zeros((2, 0, 3))), "at least 1"),
    (arrays(actions=np.full((2, 5, 3), 9.0)), "clip them"),
    (arrays(actions=np.full((2, 5, 3), np.nan)), "finite"),
    (arrays(mask=np.ones((2, 5))), "type bool"),
    (arrays(mask=np.zeros((2, 5), bool)), "lack a visited state")])
def test_bad_demonstrations_file_is_refused_in_one_line(tmp_path, capsys, content, word):
    path = tmp_path / "demos.npz"
    if isinstance(content, dict):
        np.savez(path, **content)
    elif content is not None:
        path.write_bytes(content)
    line = refused(capsys, *ARGUMENTS, "--demos", path, "--out", tmp_path / "out")
    assert word in line and "demos.npz" in line


@pytest.mark.parametrize("name", ["minari", "h5py"])
def test_without_minari_one_line_says_what_to_install(finished, capsys, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    advice = "pip install -r requirements-extra.txt"
    assert advice in refused(capsys, *ARGUMENTS, "--demos", "x/push-v0")
    assert minari_export.main([str(finished)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and advice in lines[0]


def test_spoilt_demonstrations_of_a_run_are_refused_until_deleted(finished, tmp_path, capsys):
    """Cut short, and whole at its end but not inside; deleted, the run makes them again."""
    out = copied(finished, tmp_path / "out", "settings.json", "experts.pt", "demonstrations.npz")
    path = out / "demonstrations.npz"
    whole = path.read_bytes()
    for spoilt in (whole[:-3000], whole[:1000] + bytes(1000) + whole[2000:]):
        path.write_bytes(spoilt)
        assert "delete it, and the run makes it again" in refused(capsys, *ARGUMENTS, "--out", out)
    path.unlink()
    assert start(*ARGUMENTS, "--out", out) == 0 and timeless(out) == timeless(finished)


# ---------------------------------------------------------------- policies and experts
def bytes_of(change):
    return lambda path, _: path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize("spoil, word", [
    pytest.param(lambda path, _: path.unlink(), "train first", id="missing"),
    pytest.param(bytes_of(lambda whole: whole[:-2000]), "truncated", id="truncated"),
    pytest.param(bytes_of(lambda whole: whole[:-1]), "truncated", id="one byte short"),
    pytest.param(bytes_of(lambda whole: whole + b"x"), "truncated", id="one byte more"),
    pytest.param(bytes_of(lambda whole: whole[:-71]), "truncated", id="without its digest"),
    pytest.param(bytes_of(lambda whole: whole[:2]), "truncated", id="two bytes"),
    pytest.param(bytes_of(lambda _: b""), "truncated", id="no bytes"),
    pytest.param(bytes_of(lambda _: b"\x89PNG\r\n\x1a\n" + bytes(100)), "truncated", id="picture"),
    pytest.param(bytes_of(lambda _: b"U"), "truncated", id="one letter"),
    pytest.param(bytes_of(lambda _: b"Jello, world"), "truncated", id="a short text"),
    pytest.param(lambda path, _: path.unlink() or path.mkdir(), "truncated", id="a folder"),
    pytest.param(lambda path, _: torch.save({"weights": torch.zeros(3)}, path), "not a policy",
                 id="foreign"),
    pytest.param(lambda path, _: torch.save([1, 2], path), "not a policy", id="a list"),
    pytest.param(lambda path, _: torch.save({"format": "gmps checkpoint 2", "kind": "policy"},
                                            path), "another version", id="of another version"),
    pytest.param(lambda path, other: shutil.copy(other, path), "not a policy", id="other kind")])
def test_bad_policy_file_is_refused_in_one_line(finished, tmp_path, capsys, spoil, word):
    out = copied(finished, tmp_path / "copy", "policy.pt")
    spoil(out / "policy.pt", finished / "experts.pt")
    assert word in refused(capsys, *EVALUATE, out)


def test_bad_checkpoints_beside_a_policy_or_of_a_run_are_refused(finished, tmp_path, capsys):
    """Experts of another run beside a policy, and in the folder of a run; experts cut short."""
    out = copied(finished, tmp_path / "copy", "policy.pt", "experts.pt", "settings.json")
    content = load_checkpoint(out / "experts.pt", "experts")
    other = dataclasses.replace(content.pop("settings"), seed=7)
    save_checkpoint(out / "experts.pt", "experts", other, content)
    assert "experts.pt is of another run" in refused(capsys, *EVALUATE, out)
    (out / "policy.pt").unlink()
    assert "experts.pt belongs to another run" in refused(capsys, *ARGUMENTS, "--out", out)
    (out / "experts.pt").write_bytes((out / "experts.pt").read_bytes()[:3000])
    assert "experts.pt is truncated" in refused(capsys, *ARGUMENTS, "--out", out)


# ---------------------------------------------------------------- no OpenGL
WITHOUT_GL = """
import contextlib, ctypes, io, os
os.environ["MUJOCO_GL"] = library
original = ctypes.CDLL.__init__
def hiding(self, name, *arguments, **named):
    if name and ("EGL" in name or "OSMesa" in name):
        raise OSError("hidden")
    original(self, name, *arguments, **named)
ctypes.CDLL.__init__ = hiding
import run
with contextlib.redirect_stderr(io.StringIO()) as errors:
    codes = [run.main(["--task", "push-vision", "--quick"]), run.main(["--set", "seed=1"])]
answer.send((codes, errors.getvalue().splitlines()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="MuJoCo has these libraries on Linux alone")
@pytest.mark.parametrize("library", ["bogus", "egl", "osmesa"])
def test_opengl_library_that_is_absent_stops_only_what_needs_pictures(library):
    """It is no library, or not installed. Push is refused for another reason: it would begin."""
    codes, (vision, push) = answer_of(WITHOUT_GL, library=library)
    assert codes == [2, 2] and vision.startswith("error: no OpenGL") and "use --seed" in push


def test_a_model_without_the_camera_of_its_policy_is_one_line(capsys, monkeypatch):
    """Before any work. The camera is looked for first, so this needs no OpenGL."""
    without = SawyerPushVision.xml
    monkeypatch.setattr(SawyerPushVision, "xml", lambda self: without(self).replace(
        '<camera name="policy"', '<camera name="other"'))
    assert "'policy'" in refused(capsys, "--task", "push-vision", "--quick")


# ---------------------------------------------------------------- faults of a user's own files
class Careless:
    """A method by somebody else: a numpy scalar in its metrics, no expert, no adaptation."""
    Settings, tests = Settings, True

    class Adapter:
        sequential = False

        def __init__(self, policy, family, settings, device):
            self.family = family

        def begin(self, count, generator):
            pass

        def act(self, observation, last=None, explore=True):
            return np.zeros((len(observation), self.family.action_size))

        def update(self, episodes):
            pass

    @classmethod
    def train(cls, problem, settings, state=None):
        yield ({"policy": {"w": torch.ones(2)}, "training": None},
               {"iteration": 1, "progress": 1.0, "env_steps": np.float64(7),
                "return": np.float64(3.0)})
        if cls.tests:
            problem.meta_test(cls.Adapter({}, problem.family, settings, "cpu"))


def test_methods_that_ask_no_expert_and_slip(tmp_path, capsys, monkeypatch):
    """It pays for no expert, its checkpoint can be read, and a forgotten meta-test is named."""
    monkeypatch.setattr(baselines, "load", lambda name: Careless)
    assert start(*ARGUMENTS, "--out", tmp_path / "a") == 0
    result = result_of(tmp_path / "a")
    assert [result["env_steps"][phase] for phase in ("experts", "meta_training")] == [0, 7]
    assert load_checkpoint(tmp_path / "a" / "policy.pt", "policy")["rows"][0]["return"] == 3.0
    monkeypatch.setattr(Careless, "tests", False)
    assert start(*ARGUMENTS, "--set=curve=0", "--out", tmp_path / "b") == 2
    assert "error: gmps: train() ended without its last act" in capsys.readouterr().err


def test_states_that_could_not_be_read_again_are_refused(tmp_path):
    journal = checkpoints.Journal(tmp_path, Settings())
    with pytest.raises(checkpoints.UserError, match="no numpy arrays"):
        journal.save("policy.pt", "policy", {"policy": {"w": np.ones(2)}})
    assert not list(tmp_path.iterdir())


def test_a_fault_in_a_picture_costs_no_numbers(finished, tmp_path, capsys, monkeypatch):
    out = shutil.copytree(finished, tmp_path / "copy")
    (out / "result.json").unlink()

    def broken(*_):
        raise ValueError('The camera "video" does not exist.')
    monkeypatch.setattr(phases, "draw_plot", broken)
    assert start(*ARGUMENTS, "--out", out) == 0
    assert "a picture is missing" in capsys.readouterr().out
    assert result_of(out)["held_out"] == result_of(finished)["held_out"]
