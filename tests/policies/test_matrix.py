"""Every algorithm with every policy name it has: train, save, load in a fresh process, and predict the same there."""

import inspect
import json
import subprocess
import sys
import traceback

import numpy as np
import torch as th
from helpers import vector_env
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_flipout.policies import FlipoutPolicyMixin
from sb3_flipout.registration import ALIASES

OBSERVATIONS = {"Mlp": "vector", "Cnn": "image", "MultiInput": "dict"}
EXTRACTOR = {"Mlp": {}, "Cnn": dict(features_dim=8), "MultiInput": dict(cnn_output_dim=8)}
DISCRETE = {"DQN", "QRDQN", "MaskablePPO"}
CASES = {f"{algorithm.__name__}-{name}": (algorithm, name) for algorithm, names in ALIASES.items() for name in names}


def kind_of(name):
    return next(kind for kind in sorted(OBSERVATIONS, key=len, reverse=True) if name.startswith(f"Flipout{kind}"))


def taken(function, **candidates):
    """Those of the arguments that a function has."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in candidates.items() if name in known}


def build(algorithm, name):
    kind = kind_of(name)
    env = vector_env("discrete" if algorithm.__name__ in DISCRETE else "box", 2, observation=OBSERVATIONS[kind])
    net = dict(net_arch=[8], features_extractor_kwargs=EXTRACTOR[kind], schedule="constant")  # noise after training too
    if "Lstm" in name:
        net["lstm_hidden_size"] = 8
    common = taken(algorithm, n_steps=4, batch_size=4, n_epochs=1, buffer_size=50, learning_starts=2, train_freq=1)
    common |= taken(algorithm, exploration_initial_eps=0.0, exploration_final_eps=0.0)
    if issubclass(algorithm, OffPolicyAlgorithm):
        common.pop("n_steps", None)  # there, of the returns
    return algorithm(name, env, seed=1, policy_kwargs=net, **common)


def trained(algorithm, name):
    """A model after at least two updates, and its observations."""
    model = build(algorithm, name)
    model.learn(16, **taken(model.learn, use_masking=False))
    assert model._n_updates >= 2
    obs = model.env.reset()
    model.predict(obs, deterministic=False)  # so that the evaluation stream is not at its beginning
    return model, obs


def predictions(model, obs):
    """Actions of the mean weights, and of the next noise of the evaluation stream."""
    result = {}
    for deterministic in (True, False):
        th.manual_seed(0)
        np.random.seed(0)
        result[str(deterministic)] = model.predict(obs, deterministic=deterministic)[0]
    return result


def check_in_this_process(folder):
    """What the fresh process does: load each model, predict, and write down what went wrong."""
    import importlib

    import torch

    torch.set_num_threads(1)
    assert "sb3_flipout" not in sys.modules
    failures = {}
    for case, (module, algorithm) in json.loads((folder / "cases.json").read_text()).items():
        try:
            model = getattr(importlib.import_module(module), algorithm).load(folder / f"{case}.zip", device="cpu")
            obs = dict(np.load(folder / f"{case}.obs.npz"))
            expected = np.load(folder / f"{case}.actions.npz")
            got = predictions(model, obs.get("only", obs))
            for deterministic, actions in got.items():
                np.testing.assert_array_equal(actions, expected[deterministic], err_msg=f"deterministic={deterministic}")
        except Exception:
            failures[case] = traceback.format_exc()
    (folder / "failures.json").write_text(json.dumps(failures))


CHILD = """
import inspect, json, sys, traceback
from pathlib import Path
import numpy as np
import torch as th
{functions}
check_in_this_process(Path({folder!r}))
"""


def test_all_pass(tmp_path):
    failures, cases, noisy = {}, {}, {}
    for case, (algorithm, name) in CASES.items():
        try:
            model, obs = trained(algorithm, name)
            assert isinstance(model.policy, FlipoutPolicyMixin)
            model.save(tmp_path / case)  # before predicting: the file has the state of the evaluation stream
            actions = predictions(model, obs)
            noisy[case] = not np.array_equal(actions["True"], predictions(model, obs)["False"])
            np.savez(tmp_path / f"{case}.obs.npz", **(obs if isinstance(obs, dict) else {"only": obs}))
            np.savez(tmp_path / f"{case}.actions.npz", **actions)
            cases[case] = (algorithm.__module__, algorithm.__name__)
        except Exception:
            failures[case] = traceback.format_exc()
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    functions = "\n".join(inspect.getsource(function) for function in (predictions, check_in_this_process))
    code = CHILD.format(functions=functions, folder=str(tmp_path))
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200)
    failures |= json.loads((tmp_path / "failures.json").read_text())
    assert not failures, "\n".join(f"{case}:\n{error}" for case, error in failures.items())
    continuous = {case for case, (algorithm, _) in CASES.items() if algorithm.__name__ not in DISCRETE}
    assert all(noisy[case] for case in continuous)  # else nothing was compared beside the mean weights
