"""MonitorNoise writes what docs/logged_values.md defines, and training does not notice."""

from __future__ import annotations

import importlib
import io
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from helpers import vector_env
from probes import SMALL, make, parameters
from sb3_contrib import QRDQN, TQC, CrossQ, MaskablePPO, RecurrentPPO
from stable_baselines3 import DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.logger import HumanOutputFormat, Logger, configure
from stable_baselines3.common.vec_env import VecNormalize
from tensorboard.backend.event_processing.event_accumulator import STORE_EVERYTHING_SIZE_GUIDANCE, EventAccumulator

from sb3_flipout.callbacks import AdaptNoise, AnnealNoise, MonitorNoise, NoiseEvalCallback
from sb3_flipout.diagnostics.statistics import action_statistics, draw, member_statistics, noisy_layers
from sb3_flipout.noise import RowNoise

DOCS = Path(__file__).parents[2] / "docs" / "logged_values.md"
STEERING = "AnnealNoise, AdaptNoise, StopOnNonFinite"
MEMBERS = dict(policy_kwargs=dict(net_arch=[16], members=4, prior_scale=1.0))

#: Runs, and what of "discrete", "continuous", "distribution" and "members" they are.
RUNS: dict[str, tuple[type[BaseAlgorithm], str, dict[str, Any], set[str]]] = {
    "ppo-discrete": (PPO, "discrete", {}, {"discrete", "distribution"}),
    "ppo-multidiscrete": (PPO, "multidiscrete", {}, {"discrete", "distribution"}),
    "ppo-multibinary": (PPO, "multibinary", {}, {"discrete", "distribution"}),
    "ppo-box": (PPO, "box", {}, {"continuous", "distribution"}),
    "ppo-gsde": (PPO, "box", dict(use_sde=True), {"continuous", "distribution"}),
    "dqn": (DQN, "discrete", {}, {"discrete", "distribution"}),
    "qrdqn": (QRDQN, "discrete", {}, {"discrete", "distribution"}),
    "maskable": (MaskablePPO, "multidiscrete", {}, {"discrete", "distribution"}),
    "recurrent": (RecurrentPPO, "discrete", {}, {"discrete", "distribution"}),
    "sac": (SAC, "box", {}, {"continuous", "distribution"}),
    "tqc": (TQC, "box", {}, {"continuous", "distribution"}),
    "crossq": (CrossQ, "box", {}, {"continuous", "distribution"}),
    "td3": (TD3, "box", {}, {"continuous"}),
    "dqn-members": (DQN, "discrete", MEMBERS, {"discrete", "distribution", "members"}),
}


def documented() -> dict[str, list[tuple[str, set[str]]]]:
    """For each section of the page its tags, and what they are written for."""
    found: dict[str, list[tuple[str, set[str]]]] = defaultdict(list)
    section = ""
    for line in DOCS.read_text(encoding="utf-8").splitlines():
        section = line[3:] if line.startswith("## ") else section
        row = re.match(r"\| `(noise[^`]*)` \| ([^|]*) \|", line)
        if row:
            found[section].append((row[1], {word.strip() for word in row[2].split(",")}))
    return found


def spelled_out(tags: list[str], **names: list[str]) -> set[str]:
    """Tags with each name in the place of each placeholder."""
    for placeholder, values in names.items():
        tags = [tag.replace(f"<{placeholder}>", value) for tag in tags for value in values]
    return set(tags)


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), STORE_EVERYTHING_SIZE_GUIDANCE)
    accumulator.Reload()
    return accumulator


def written(folder: Path) -> set[str]:
    tags = events(folder).Tags()
    return {tag for kind in ("scalars", "histograms", "images", "tensors") for tag in tags[kind] if tag.startswith("noise")}


def small(algorithm: type[BaseAlgorithm], action: str, **kwargs: Any) -> BaseAlgorithm:
    """A small model with four environments, of algorithms too that other tests of callbacks do not use."""
    if algorithm in (PPO, DQN):
        return make(algorithm, action=action, n_envs=4, **kwargs)
    off_policy: dict[str, Any] = dict(learning_starts=16, batch_size=8, buffer_size=200)
    settings = {MaskablePPO: SMALL[PPO], RecurrentPPO: SMALL[PPO], QRDQN: SMALL[DQN] | {"exploration_final_eps": 0.0}}
    name = "FlipoutMlpLstmPolicy" if algorithm is RecurrentPPO else "FlipoutMlpPolicy"
    noise: dict[str, Any] = dict(learn_sigma=True, schedule="constant")  # as `make` has it
    common: dict[str, Any] = dict(seed=0, device="cpu", policy_kwargs=dict(net_arch=[16], **noise))
    return algorithm(name, vector_env(action, 4), **common, **settings.get(algorithm, off_policy), **kwargs)


def train(
    run: str, callback: BaseCallback, folder: Path | None = None, steps: int = 64, formats: tuple[str, ...] = ("tensorboard",)
) -> BaseAlgorithm:
    algorithm, action, kwargs, _ = RUNS[run]
    model = small(algorithm, action, **kwargs)
    if folder is not None:
        model.set_logger(configure(str(folder), list(formats)))
    masking = {"use_masking": False} if algorithm is MaskablePPO else {}
    model.learn(steps, callback=callback, log_interval=1, **masking)
    if folder is not None:
        model.logger.dump(model.num_timesteps)  # off-policy SB3 writes at ends of episodes; what is left follows here
        model.logger.close()
    return model


@pytest.mark.parametrize("run", RUNS)
def test_the_event_file_has_every_documented_tag_and_no_other(run: str, tmp_path: Path) -> None:
    model = train(run, MonitorNoise(every=32), tmp_path)
    is_a = {"all", *RUNS[run][3]}
    tags = [tag for tag, conditions in documented()["MonitorNoise"] if conditions & is_a]
    not_measured = {"noise/lstm_actor/output_share"}  # as the page says
    assert written(tmp_path) == spelled_out(tags, layer=list(noisy_layers(model.policy))) - not_measured


def test_the_tags_of_steering_and_evaluation_are_documented_too(tmp_path: Path) -> None:
    sections = documented()
    steering = AdaptNoise(target=0.1)
    train("ppo-discrete", CallbackList([steering, NoiseEvalCallback(vector_env("discrete", 1), eval_freq=8)]), tmp_path / "a")
    tags = {tag for tag, conditions in sections[STEERING] if "AdaptNoise" in conditions}
    evaluation = [tag for tag, conditions in sections["NoiseEvalCallback"] if "all" in conditions]
    assert written(tmp_path / "a") == tags | spelled_out(evaluation, weights=["mean", "sampled"])
    train("dqn-members", NoiseEvalCallback(vector_env("discrete", 1), eval_freq=8), tmp_path / "b")
    assert written(tmp_path / "b") == spelled_out(evaluation, weights=["mean", "sampled", "vote"])
    train("ppo-discrete", AnnealNoise(1.0, 0.0), tmp_path / "c")
    assert written(tmp_path / "c") == {t for t, c in sections[STEERING] if "AnnealNoise" in c}


def test_sections_of_the_page_are_read() -> None:
    assert {name: len(tags) > 2 for name, tags in documented().items()} == dict.fromkeys(documented(), True)
    assert set(documented()) == {"MonitorNoise", STEERING, "NoiseEvalCallback"}


# ---- training does not notice -------------------------------------------------------------------------------------


class Spend(BaseCallback):
    """Does nothing."""

    def _on_step(self) -> bool:
        return True


class Modes(BaseCallback):
    """Remember modes, bases and active noise at ends of rollouts, after the callbacks before it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        policy = self.model.policy
        layers = noisy_layers(policy).values()
        bases = [base.clone() for layer in layers for base in layer.bases()[1].values()]
        assert bases
        self.seen.append(([module.training for module in policy.modules()], bases, [layer.base_key for layer in layers]))
        assert policy.perturbed_network.active is None
        assert not any(layer._forward_hooks for layer in layers)


@pytest.mark.parametrize("run", ["ppo-discrete", "ppo-gsde", "dqn", "dqn-members", "sac", "td3", "crossq"])
def test_training_is_bit_for_bit_the_same(run: str) -> None:
    modes, plain_modes = Modes(), Modes()
    monitored = train(run, CallbackList([MonitorNoise(every=1), modes]), steps=160)
    plain = train(run, CallbackList([Spend(), plain_modes]), steps=160)
    assert all(th.equal(a, b) for a, b in zip(parameters(monitored), parameters(plain), strict=True))
    assert monitored.policy.noise_state() == plain.policy.noise_state()
    assert len(modes.seen) == len(plain_modes.seen) > 1
    for (mode, bases, keys), (plain_mode, plain_bases, plain_keys) in zip(modes.seen, plain_modes.seen, strict=True):
        assert mode == plain_mode and keys == plain_keys
        assert all(th.equal(a, b) for a, b in zip(bases, plain_bases, strict=True))


class Untouched(MonitorNoise):
    """Fails where measuring moves a global generator."""

    measured = 0

    def _measure(self) -> None:
        torch_state, numpy_state = th.get_rng_state(), np.random.get_state()[1].copy()
        super()._measure()
        assert th.equal(torch_state, th.get_rng_state()) and np.array_equal(numpy_state, np.random.get_state()[1])
        self.measured += 1


@pytest.mark.parametrize("run", ["ppo-discrete", "dqn-members"])
def test_global_generators_stay(run: str) -> None:
    callback = Untouched(every=1)
    train(run, callback, steps=64)
    assert callback.measured > 1


# ---- what is written, and where -----------------------------------------------------------------------------------


def scalars(folder: Path, tag: str) -> list[float]:
    return [event.value for event in events(folder).Scalars(tag)]


def test_the_period_is_kept(tmp_path: Path) -> None:
    train("ppo-discrete", MonitorNoise(every=40), tmp_path, steps=192)  # rollouts of 32 steps: measured at 64, 128, 192
    assert [event.step for event in events(tmp_path).Scalars("noise/kl")] == [64, 128, 192]


@pytest.mark.parametrize("wanted", [True, False])
def test_histograms_and_figures_can_be_left_out(wanted: bool, tmp_path: Path) -> None:
    train("ppo-discrete", MonitorNoise(every=1, histograms=wanted, figures=wanted), tmp_path, steps=32 * 11)
    tags = events(tmp_path).Tags()
    assert bool(tags["histograms"]) == wanted
    assert tags["images"] == (["noise/sigma_figure"] if wanted else [])
    if wanted:
        assert [event.step for event in events(tmp_path).Images("noise/sigma_figure")] == [32, 352]


def test_people_are_not_flooded(tmp_path: Path) -> None:
    text = io.StringIO()
    model = make(PPO)
    model.set_logger(Logger(str(tmp_path), [HumanOutputFormat(text)]))
    model.learn(32, callback=MonitorNoise(every=1), log_interval=1)
    shown = set(re.findall(r"\|    (\w\S*) ", text.getvalue()))
    assert {"scale", "sigma", "snr_q50", "kl", "output_share"} <= shown
    assert not {name for name in shown if "policy_net" in name or "action_net" in name or name in ("snr_q05", "snr_q95")}


def test_other_formats_take_all_numbers(tmp_path: Path) -> None:
    train("dqn-members", MonitorNoise(every=32), tmp_path, formats=("csv", "json", "tensorboard"))
    header = (tmp_path / "progress.csv").read_text().splitlines()[0].split(",")
    assert {tag for tag in header if tag.startswith("noise")} == set(
        t for t in events(tmp_path).Tags()["scalars"] if "noise" in t
    )


@pytest.mark.parametrize("run", ["ppo-discrete", "dqn-members"])
def test_custom_scalars_are_laid_out_once(run: str, tmp_path: Path) -> None:
    algorithm, action, kwargs, _ = RUNS[run]
    model = small(algorithm, action, **kwargs)
    model.set_logger(configure(str(tmp_path), ["tensorboard"]))
    callback = MonitorNoise(every=32)
    model.learn(32, callback=callback)
    model.learn(32, callback=callback, reset_num_timesteps=False)
    model.logger.close()
    layouts = events(tmp_path).Tensors("custom_scalars__config__")
    assert len(layouts) == 1
    layout = layouts[0].tensor_proto.string_val[0].decode("utf-8", "replace")
    charts = [expression for expression in re.findall(r"noise[\w/().+|^$*]*", layout) if "/" in expression]
    tags = [tag.replace("<layer>", "x").replace("<weights>", "mean") for rows in documented().values() for tag, _ in rows]
    assert ("vote_share" in layout) == (run == "dqn-members")
    assert len(charts) > 12 and all(any(re.match(chart, tag) for tag in tags) for chart in charts)


def test_noise_that_is_off_is_shown_as_none(tmp_path: Path) -> None:
    model = make(PPO)
    model.policy.noise_scale = 0.0
    model.set_logger(configure(str(tmp_path), ["tensorboard"]))
    model.learn(16, callback=MonitorNoise(every=1), log_interval=1)
    model.logger.close()
    assert scalars(tmp_path, "noise/scale") == scalars(tmp_path, "noise/kl") == [0.0]
    assert scalars(tmp_path, "noise/disagreement") == scalars(tmp_path, "noise/output_share") == [0.0]
    assert scalars(tmp_path, "noise/entropy_weights") == pytest.approx([0.0], abs=1e-6)
    assert not {tag for tag in written(tmp_path) if "snr" in tag or "correlation" in tag}


# ---- the numbers --------------------------------------------------------------------------------------------------


def test_correlation_tells_shared_noise_from_flipout() -> None:
    found = {}
    for sharing in ("flipout", "shared"):
        kwargs = dict(net_arch=[16], noise_sharing=sharing, resample="rollout", perturb="heads")
        model = make(PPO, policy_kwargs=kwargs)
        obs = th.ones(8, 5)  # the same for all, so that one draw moves all alike
        found[sharing] = action_statistics(draw(model.policy, obs, 64, 0))["noise/correlation"]
    # Of 64 draws and 28 pairs of rows: a standard error of about 1 / sqrt(64 * 28) = 0.024, at 5 of them 0.12.
    assert found["shared"] == pytest.approx(1.0, abs=1e-4) and abs(found["flipout"]) < 0.12


def test_noise_that_a_ladder_takes_from_some_environments_is_not_seen_there() -> None:
    model = make(PPO)
    model.policy.noise_ladder = (0.0, 1.0)
    views = draw(model.policy, th.ones(6, 5), 4, 0).views
    outputs = th.stack([view.outputs for view in views])
    still = (outputs == outputs[:1]).all(0).all(1)
    assert still.tolist() == [True, False] * 3


@pytest.mark.parametrize("base_every", [1, None])
def test_the_base_is_drawn_where_it_moves_in_training(base_every: int | None) -> None:
    model = make(PPO, policy_kwargs=dict(net_arch=[16], base_every_rollouts=base_every))
    layer, seen = next(iter(noisy_layers(model.policy).values())), []
    hook = layer.register_forward_hook(lambda layer, *_: seen.append(layer.base_key))
    draw(model.policy, th.ones(2, 5), 4, 0)
    hook.remove()
    assert len(set(seen[1:])) == (4 if base_every else 1) and layer.base_key == seen[0]


def test_members_are_counted_one_by_one() -> None:
    policy = make(DQN, **MEMBERS).policy
    obs = th.randn(50, 5, generator=th.Generator().manual_seed(0))
    found, values = member_statistics(policy, obs), policy.member_values(obs)
    choices = values.argmax(2).T.tolist()  # by observation
    pairs = [a != b for votes in choices for i, a in enumerate(votes) for j, b in enumerate(votes) if i != j]
    assert found["noise/member_disagreement"] == pytest.approx(sum(pairs) / len(pairs)) != 0
    assert found["noise/vote_share"] == pytest.approx(np.mean([max(map(votes.count, votes)) / 4 for votes in choices]))
    assert found["noise/member_value_std"] == pytest.approx(float(np.std(values.numpy(), axis=0, ddof=1).mean()))
    assert member_statistics(make(DQN).policy, obs) == member_statistics(make(PPO).policy, obs) == {}


def test_draws_are_those_of_members() -> None:
    policy, keys = make(DQN, **MEMBERS).policy, set()
    layer = next(iter(noisy_layers(policy).values()))

    def note(*_: Any) -> None:
        noise = policy.perturbed_network.active
        keys.update(noise.keys.tolist() if isinstance(noise, RowNoise) else [])  # the mean weights come first

    hook = layer.register_forward_hook(note)
    draw(policy, th.ones(20, 5), 4, 0)
    hook.remove()
    assert keys == {0, 1, 2, 3}


class Rate(BaseCallback):
    """Count by hand how many keys change from step to step: what the rollout buffer stores is what acted."""

    drawn = 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        keys = self.model.rollout_buffer.noise_keys
        self.drawn += int((np.diff(keys, axis=0) != 0).sum()) + (0 if self._same_as_before(keys) else keys.shape[1])
        self._last = keys[-1].copy()

    def _same_as_before(self, keys: np.ndarray) -> bool:
        return hasattr(self, "_last") and bool((self._last == keys[0]).all())


@pytest.mark.parametrize("resample", ["step", "rollout", 2])
def test_resamples_are_counted(resample: str | int, monkeypatch: pytest.MonkeyPatch) -> None:
    monitor, rate = MonitorNoise(every=10**9), Rate()
    model = make(PPO, policy_kwargs=dict(net_arch=[16], resample=resample))
    monkeypatch.setattr("sb3_flipout.callbacks.monitor.time.monotonic", lambda: 0.0)
    model.learn(64, callback=CallbackList([monitor, rate]))
    monkeypatch.setattr("sb3_flipout.callbacks.monitor.time.monotonic", lambda: 2.0)
    assert monitor._resample_rate() == rate.drawn / 2


def test_resamples_at_ends_of_episodes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = MonitorNoise(every=10**9)
    model = make(PPO, policy_kwargs=dict(net_arch=[16], resample="episode"))
    monkeypatch.setattr("sb3_flipout.callbacks.monitor.time.monotonic", lambda: 0.0)
    model.learn(64, callback=monitor)
    monkeypatch.setattr("sb3_flipout.callbacks.monitor.time.monotonic", lambda: 1.0)
    assert monitor._resample_rate() == len(model.ep_info_buffer) > 0


class NearStored(BaseCallback):
    """At the end of a rollout: how far the observations measured with are from stored ones."""

    def __init__(self, shown: list[th.Tensor]) -> None:
        super().__init__()
        self.shown, self.farthest = shown, 0.0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        model, shown = self.model, self.shown[-1].numpy()
        stored = (getattr(model, "rollout_buffer", None) or model.replay_buffer).observations.reshape(-1, 5)
        if isinstance(model, DQN) and model.get_vec_normalize_env() is not None:
            stored = model.get_vec_normalize_env().normalize_obs(stored)
        self.farthest = max(self.farthest, np.abs(stored[None] - shown[:, None]).max(-1).min(1).max())


@pytest.mark.parametrize("algorithm", [PPO, DQN])
@pytest.mark.parametrize("normalize", [False, True])
def test_observations_are_real_ones(algorithm: type[BaseAlgorithm], normalize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[th.Tensor] = []

    def spy(policy: Any, obs: th.Tensor, *args: Any) -> Any:
        shown.append(obs)
        return draw(policy, obs, *args)

    monkeypatch.setattr("sb3_flipout.callbacks.monitor.draw", spy)
    env = vector_env("discrete", 2)
    near = NearStored(shown)
    monitor = MonitorNoise(every=1, observations=8)
    make(algorithm, VecNormalize(env) if normalize else env).learn(48, callback=CallbackList([monitor, near]))
    assert len(shown) > 2 and all(obs.shape == (8, 5) for obs in shown)
    assert len(np.unique(shown[-1].numpy(), axis=0)) > 2
    assert near.farthest < 1e-6


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(every=0), ValueError, "every must be an integer >= 1, got 0"),
        (dict(every=2.5), TypeError, "every must be an integer >= 1, got 2.5 of type float"),
        (dict(draws=1), ValueError, "draws must be an integer >= 2, got 1. Fewer do not tell noise from inputs."),
        (
            dict(observations=1),
            ValueError,
            "observations must be an integer >= 2, got 1. Fewer do not tell noise from inputs.",
        ),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        MonitorNoise(**arguments)


def test_stock_policies_are_refused() -> None:
    model = PPO("MlpPolicy", vector_env("discrete"), n_steps=8, batch_size=8, device="cpu")
    with pytest.raises(ValueError, match="MonitorNoise needs a flipout policy"):
        model.learn(8, callback=MonitorNoise())


@pytest.mark.slow
def test_rl_zoo_takes_it_by_its_name(tmp_path: Path) -> None:
    import subprocess
    import sys

    importlib.import_module("rl_zoo3")
    config = tmp_path / "ppo.yml"
    config.write_text(
        "CartPole-v1:\n  n_envs: 2\n  n_timesteps: 512\n  policy: FlipoutMlpPolicy\n  n_steps: 64\n  batch_size: 64\n"
        "  callback:\n    - sb3_flipout.callbacks.MonitorNoise:\n        every: 128\n        figures: false\n"
    )
    command = "train --algo ppo --env CartPole-v1 --seed 1 --num-threads 1 --device cpu --tensorboard-log".split()
    result = subprocess.run(
        [sys.executable, "-m", f"rl_zoo3.{command[0]}", *command[1:], str(tmp_path / "tb"), "-f", str(tmp_path / "logs"),
         "--conf-file", str(config)],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    folder = next((tmp_path / "tb").rglob("events.*")).parent
    assert len(scalars(folder, "noise/kl")) == 4
