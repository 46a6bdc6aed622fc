"""Adapt a trained policy to goals of your own, from Python.

    python examples/adapt.py
"""
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

from envs import Environments
from evaluate import evaluate
from phases import load_adapter

family, adapter, _ = load_adapter(HERE / "results/push/gmps/policy")
goals = np.array([[0.05, 0.72], [-0.08, 0.78]])  # metres: x to the side, y away from the arm
evaluation = evaluate(Environments(family), adapter, goals, rounds=3, episodes=20, seed=0)
for entry in evaluation.lists["held_out"]:
    print(f"goal {entry['task']}, {entry['adaptation_episodes']} episodes: return "
          f"{entry['return']:.0f}, {100 * entry['final_distance']:.1f} cm from the goal")
