"""Policies go out and come back as they were, without code; whatever else is in the files is refused, and none of it run."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch as th
from export_cases import BOX, CASES, DICT, IMAGE, VECTOR, Spaces, build
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

import sb3_flipout
from sb3_flipout import export_policy, import_policy
from sb3_flipout.export.describe import described, value_of
from sb3_flipout.policies import FlipoutMultiInputActorCriticPolicy


@pytest.mark.parametrize("case", CASES)
def test_a_policy_comes_back_as_it_was(case: str, tmp_path: Path) -> None:
    model = build(case)
    policy = sb3_flipout.flipout_policy(model)
    policy.noise_scale = 0.7
    again: Any = import_policy(export_policy(model, tmp_path), "cpu")
    assert type(again) is type(model.policy) and again.noise_state() == policy.noise_state()
    assert again.observation_space == model.observation_space and again.action_space == model.action_space
    weights, theirs = again.state_dict(), model.policy.state_dict()
    assert weights.keys() == theirs.keys()
    assert all(th.equal(weights[name], theirs[name]) or name == "prior.unit" for name in theirs)
    obs = np.stack([model.observation_space.sample() for _ in range(4)]) if case != "a2c, dict" else None
    obs = {"vector": np.zeros((4, 3), np.float32), "number": np.array([0, 1, 2, 0])} if obs is None else obs
    model.policy.set_training_mode(False)
    for one in (True,) if case == "flipes" else (False, True):  # FlipES draws its base itself, generation by generation
        th.manual_seed(0), np.random.seed(0)
        mine = model.policy.predict(obs, deterministic=one)[0]
        th.manual_seed(0), np.random.seed(0)
        assert np.array_equal(mine, again.predict(obs, deterministic=one)[0]), one


def test_what_cannot_be_described_is_told(tmp_path: Path) -> None:
    class Own(BaseFeaturesExtractor):
        def __init__(self, space: spaces.Box) -> None:
            super().__init__(space, 3)
            self.linear = nn.Linear(3, 3)

        def forward(self, x: th.Tensor) -> th.Tensor:
            return self.linear(x)

    env = Spaces(VECTOR, BOX)
    model = PPO("FlipoutMlpPolicy", env, policy_kwargs=dict(features_extractor_class=Own), device="cpu")
    with pytest.raises(
        TypeError, match=r"features_extractor_class is Own, which cannot be described without code.*state_dict"
    ):
        export_policy(model, tmp_path)

    class OwnPolicy(PPO.policy_aliases["FlipoutMlpPolicy"]):  # type: ignore[misc,name-defined]
        pass

    for policy in (PPO(OwnPolicy, env, device="cpu"), PPO("MlpPolicy", env, device="cpu")):
        with pytest.raises(TypeError, match="cannot be described without code: only the flipout policies"):
            export_policy(policy, tmp_path)
    assert not list(tmp_path.iterdir())


# ---- hostile files --------------------------------------------------------------------------------------------------


class Ran(Exception):
    """Code of a file was run."""


class Bomb:
    def __reduce__(self) -> Any:
        return _run, ()


def _run() -> None:
    raise Ran


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_policy(build("dqn, members"), tmp_path_factory.mktemp("exported"))


def copied(exported: Path, to: Path) -> tuple[dict[str, Any], dict[str, th.Tensor]]:
    for path in exported.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return json.loads((to / "policy.json").read_text()), safetensors.torch.load_file(to / "policy.safetensors")


def saved(folder: Path, tensors: dict[str, th.Tensor]) -> None:
    """Write tensors, with the checksum that a forger would write, too."""
    path = folder / "policy.safetensors"
    safetensors.torch.save_file(tensors, path)
    told = json.loads((folder / "policy.json").read_text())
    told["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "policy.json").write_text(json.dumps(told))


def refused(folder: Path) -> str:
    with pytest.raises(ValueError) as found:
        import_policy(folder)
    return str(found.value)


Change = Callable[[dict[str, Any]], Any]
NAME = "q_net.q_net.0.weight"
LIES: dict[str, tuple[Change, str]] = {
    "format": (lambda told: told.update(format=2), "format 2"),
    "policy": (lambda told: told.update(policy="os.system"), "os.system"),
    "no policy": (lambda told: told.pop("policy"), "no description"),
    "argument": (lambda told: told["arguments"].update(evil=1), "evil"),
    "class": (lambda told: told["arguments"].update(activation_fn={"class": "Popen"}), "no description of a value"),
    "type": (lambda told: told["arguments"].update(net_arch={"eval": "1"}), "no description of a value"),
    "wider": (lambda told: told["arguments"].update(net_arch=[10**9]), "no tensor is wider"),
    "narrower": (lambda told: told["arguments"].update(net_arch=[4]), "does not fit the tensors"),
    "deeper": (lambda told: told["arguments"].update(net_arch=[8] * 3), "does not fit the tensors"),
    "observations": (lambda told: told["arguments"]["observation_space"]["space"].update(shape=[10**9]), "sizes"),
    "other observations": (lambda told: told["arguments"]["observation_space"]["space"].update(shape=[4]), ""),
    "negative": (lambda told: told["arguments"]["action_space"]["space"].update(n=-1), "sizes"),
    "kind": (lambda told: told["arguments"]["action_space"]["space"].update(kind="Text"), "which there is not"),
    "shape": (lambda told: told["tensors"][NAME].update(shape=[1, 1]), "other tensors"),
    "dtype": (lambda told: told["tensors"][NAME].update(dtype="torch.float64"), "float64"),
    "a million observations": (
        lambda told: told["arguments"]["observation_space"]["space"].update(shape=[900_000]),
        "more than those of the file account for",
    ),
    "thirty thousand layers": (lambda told: told["arguments"].update(net_arch=[8] * 30_000), "parts or"),
    "many layers": (lambda told: told["arguments"].update(net_arch=[8] * 900), "account for"),
    "nested": (lambda told: told["arguments"].update(net_arch=json.loads("[" * 300 + "8" + "]" * 300)), "levels"),
    "a long pattern": (lambda told: told["arguments"].update(skip=["a" * 3_000_000]), "parts or"),
    "a billion members": (lambda told: told["arguments"].update(members=10**9), "the most that are taken"),
    "a huge number": (lambda told: told["arguments"].update(members=10**30), ""),
    "a schedule that is no number": (
        lambda told: told["noise"]["dict"].update(schedule_factor={"float": "nan"}),
        "noise state",
    ),
    "a negative schedule": (lambda told: told["noise"]["dict"].update(schedule_factor=-1.0), "noise state"),
    "a scale beyond all": (lambda told: told["noise"]["dict"].update(noise_scale=1e300), "noise state"),
    "negative steps": (lambda told: told["noise"]["dict"].update(steps=-1), "noise state"),
    "other tensors": (lambda told: told.update(sha256="0"), "not the file"),
    "missing tensor": (lambda told: told["tensors"].pop(NAME), "other tensors"),
    "noise": (lambda told: told["noise"]["dict"].pop("seed"), "noise state"),
    "setting": (lambda told: told["arguments"].update(sigma_init="much"), "cannot be built"),
    "members": (lambda told: told["arguments"].update(members=4), ""),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_description_that_lies_is_refused(lie: str, exported: Path, tmp_path: Path) -> None:
    told, _ = copied(exported, tmp_path)
    change, says = LIES[lie]
    change(told)
    (tmp_path / "policy.json").write_text(json.dumps(told))
    assert says in refused(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(value: float, exported: Path, tmp_path: Path) -> None:
    _, tensors = copied(exported, tmp_path)
    tensors[NAME][0, 0] = value
    saved(tmp_path, tensors)
    assert f"numbers in {NAME} that are not finite" in refused(tmp_path)


@pytest.mark.parametrize("name", ["policy.json", "policy.safetensors"])
def test_pickles_are_not_run(name: str, exported: Path, tmp_path: Path) -> None:
    copied(exported, tmp_path)
    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(Ran):
        pickle.loads((tmp_path / name).read_bytes())
    assert refused(tmp_path)


@pytest.mark.parametrize("name", ["policy.json", "policy.safetensors"])
@pytest.mark.parametrize("seed", range(50))
def test_damaged_files_are_refused(name: str, seed: int, exported: Path, tmp_path: Path) -> None:
    """Truncated, with wrong bytes, or shuffled. A wrong byte can leave a number that is one: then the policy is one, too."""
    copied(exported, tmp_path)
    generator, path = random.Random(f"{name}{seed}"), tmp_path / name
    data = bytearray(path.read_bytes())
    if seed % 3 == 0:
        data = data[: generator.randrange(len(data))]
    elif seed % 3 == 1:
        for _ in range(generator.randrange(1, 20)):
            data[generator.randrange(len(data))] = generator.randrange(256)
    else:
        at = generator.randrange(len(data))
        data[at:at] = bytes(generator.randrange(256) for _ in range(generator.randrange(1, 50)))
    path.write_bytes(bytes(data))
    try:
        policy = import_policy(tmp_path)
    except ValueError:
        return
    assert seed % 3 != 0 and all(bool(th.isfinite(value).all()) for name, value in policy.named_parameters())


@pytest.mark.parametrize("value", [float("inf"), 0.0, -1.0])
def test_units_of_priors_must_be_positive(value: float, exported: Path, tmp_path: Path) -> None:
    _, tensors = copied(exported, tmp_path)
    tensors["prior.unit"] = th.tensor(value)
    saved(tmp_path, tensors)
    assert "in prior.unit, which must be a positive number" in refused(tmp_path)


def test_types_that_no_policy_has_are_refused(exported: Path, tmp_path: Path) -> None:
    told, tensors = copied(exported, tmp_path)
    for value in (tensors[NAME].to(th.float8_e4m3fn), th.zeros(50_000, 0)):
        told["tensors"][NAME] = dict(shape=list(value.shape), dtype=str(value.dtype))
        (tmp_path / "policy.json").write_text(json.dumps(told))
        saved(tmp_path, {**tensors, NAME: value})
        assert "which is no policy's" in refused(tmp_path)


def test_what_is_no_file_is_refused(exported: Path, tmp_path: Path) -> None:
    for name in ("policy.json", "policy.safetensors"):
        copied(exported, tmp_path)
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)  # which nobody writes into: it would be waited for
        assert "is no file" in refused(tmp_path)
        (tmp_path / name).unlink()
        (tmp_path / name).symlink_to("/dev/zero")
        assert "is no file" in refused(tmp_path)
        (tmp_path / name).unlink()


NODES = [None, float("nan"), 10**30, [[[[]]]], {"dict": {}}, "text", {"tuple": [1]}, -1, True]


@pytest.mark.parametrize("seed", range(40))
def test_descriptions_that_are_changed_at_any_place_are_refused_or_harmless(seed: int, exported: Path, tmp_path: Path) -> None:
    told, _ = copied(exported, tmp_path)
    generator = random.Random(seed)
    node: Any = told
    while True:
        key = generator.choice(sorted(node) if isinstance(node, dict) else range(len(node)))
        if not isinstance(node[key], (dict, list)) or not node[key] or generator.random() < 0.3:
            break
        node = node[key]
    node[key] = generator.choice(NODES)
    (tmp_path / "policy.json").write_text(json.dumps(told))
    try:
        policy = import_policy(tmp_path)
    except ValueError:
        return
    policy.predict(np.zeros((2, 3), np.float32), deterministic=True)


def test_the_order_of_a_dictionary_stays(tmp_path: Path) -> None:
    """gymnasium calls two orders equal, and networks join the parts in theirs."""
    space = spaces.Dict(OrderedDict(b=spaces.Box(-1, 1, (2,)), a=spaces.Box(-1, 1, (2,))))
    model = PPO("FlipoutMultiInputPolicy", Spaces(space, BOX), device="cpu")
    again: Any = import_policy(export_policy(model, tmp_path), "cpu")
    obs = {"a": np.full((1, 2), 0.9, np.float32), "b": np.full((1, 2), -0.9, np.float32)}
    assert np.array_equal(model.predict(obs, deterministic=True)[0], again.predict(obs, deterministic=True)[0])
    assert list(again.observation_space.spaces) == ["b", "a"]


def test_missing_files_are_named(exported: Path, tmp_path: Path) -> None:
    copied(exported, tmp_path)
    (tmp_path / "policy.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="safetensors"):
        import_policy(tmp_path)
    with pytest.raises(FileNotFoundError, match="json"):
        import_policy(tmp_path / "nowhere")


def test_an_export_is_replaced_as_a_whole(exported: Path, tmp_path: Path) -> None:
    copied(exported, tmp_path)
    export_policy(build("ppo"), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"policy.json", "policy.safetensors"}
    assert type(import_policy(tmp_path)).__name__ == "FlipoutActorCriticPolicy"


SPACES = [
    VECTOR,
    IMAGE,
    DICT,
    BOX,
    spaces.Discrete(9, start=2),
    spaces.MultiBinary([2, 3]),
    spaces.Box(-np.inf, np.inf, (2, 2)),
]
SPACES += [spaces.Box(np.array([-1.0, 0.0]), np.array([np.inf, 0.5]), dtype=np.float64), spaces.MultiDiscrete([2, 5])]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_spaces_come_back(space: spaces.Space[Any]) -> None:
    told = json.loads(json.dumps(described(space, "space"), allow_nan=False))
    assert value_of(told, "space") == space


def test_a_space_that_could_not_be_read_back_is_not_written() -> None:
    large = spaces.Box(0, 255, (1080, 1920, 3), np.uint8)
    assert value_of(described(large, "observation_space"), "observation_space") == large
    too_large = spaces.Dict({"left": large, "right": large, "behind": large})
    with pytest.raises(ValueError, match="observation_space has more than 16000000 numbers"):
        described(too_large, "observation_space")


@pytest.mark.skipif(os.name == "nt", reason="files have no such modes there")
def test_whoever_may_read_the_description_may_read_the_tensors(exported: Path) -> None:
    description, tensors = (exported / name for name in ("policy.json", "policy.safetensors"))
    assert tensors.stat().st_mode == description.stat().st_mode


def test_sizes_of_parts_that_a_policy_does_not_have_are_let_through(tmp_path: Path) -> None:
    """What is exported is imported: without images, no tensor is as wide as ``cnn_output_dim``."""
    space = spaces.Dict(a=spaces.Box(-1, 1, (3,)), b=spaces.Discrete(4))
    kwargs = dict(features_extractor_kwargs=dict(cnn_output_dim=512))
    policy = FlipoutMultiInputActorCriticPolicy(space, spaces.Discrete(2), lambda _: 1e-3, **kwargs)
    again = import_policy(export_policy(policy, tmp_path), "cpu")
    weights = policy.state_dict()
    assert all(th.equal(value, weights[name]) for name, value in again.state_dict().items())
