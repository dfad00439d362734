"""Search over the noise: what a trial chooses reaches the policy, the YAML's settings stay, and trials can be made again."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import optuna
import pytest
from rl_zoo3 import ALGOS
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import nn

from sb3_flipout.callbacks import NoiseEvalCallback
from sb3_flipout.policies import ValueSettings
from sb3_flipout.zoo import manager, register, search

register()

# What a trial chooses need not be sensible: SB3 says so of mini-batches that do not divide a rollout.
pytestmark = pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")

NO_ARGS: dict[str, Any] = dict(using_her_replay_buffer=False, her_kwargs={})


class Drawn(Exception):
    """Carries a model out of a trial before it trains."""

    def __init__(self, model: Any) -> None:
        self.model = model


def manager_of(algo: str, env: str, config: Path | str | None = None, **kwargs: Any) -> ExperimentManager:
    from sb3_flipout.zoo import config as our_config

    path = str(our_config(algo) if config is None else config)
    made = ExperimentManager(argparse.Namespace(), algo, env, "logs", config=path, verbose=0, n_timesteps=200, **kwargs)
    made.no_optim_plots = True
    return made


def optimising(algo: str, env: str, tmp_path: Path, config: Any = None, **kwargs: Any) -> ExperimentManager:
    made = manager_of(algo, env, config, optimize_hyperparameters=True, n_evaluations=1, n_eval_episodes=1, **kwargs)
    made.save_path, made.params_path = str(tmp_path), str(tmp_path)
    assert made.setup_experiment() is None
    return made


def model_of(made: ExperimentManager, trial: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model that a trial builds."""

    def caught(self: Any, *args: Any, **kwargs: Any) -> None:
        raise Drawn(self)

    with monkeypatch.context() as patch:
        patch.setattr(ALGOS[made.algo], "learn", caught)
        with pytest.raises(Drawn) as found:
            made.objective(trial)
    return found.value.model


CASES = [
    ("ppo", "CartPole-v1"),
    ("dqn", "CartPole-v1"),
    ("sac", "Pendulum-v1"),
    ("trpo", "CartPole-v1"),
    ("td3", "Pendulum-v1"),
]


@pytest.mark.parametrize(("algo", "env"), CASES)
def test_what_a_trial_chooses_reaches_the_policy(algo: str, env: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = optimising(algo, env, tmp_path)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=3))
    seen = set()
    for _ in range(6):
        trial = study.ask()
        settings = model_of(made, trial, monkeypatch).policy.noise_settings
        chosen = {name.removeprefix("flipout_"): value for name, value in trial.params.items() if name.startswith("flipout_")}
        assert {"family", "sigma_init", "resample", "schedule"} <= chosen.keys()
        for name, value in chosen.items():
            assert getattr(settings, name) == (None if name == "members" and value == 0 else value)
        seen.add(settings.family)
        assert not {"exploration_final_eps", "exploration_fraction"} & trial.params.keys()  # the YAML's stay
    assert len(seen) > 1


def test_the_yaml_stays_where_nothing_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "ppo.yml"
    config.write_text(
        "CartPole-v1:\n  n_timesteps: 500\n  policy: FlipoutMlpPolicy\n  n_epochs: 2\n"
        "  policy_kwargs: \"dict(perturb='heads', skip=['value_net'], log_std_init=-1.0, activation_fn=nn.ELU)\"\n"
    )
    model = model_of(optimising("ppo", "CartPole-v1", tmp_path, config), optuna.create_study().ask(), monkeypatch)
    assert model.policy.noise_settings.perturb == "heads"
    assert model.policy.log_std_init == -1.0
    assert model.policy.activation_fn in (nn.Tanh, nn.ReLU)  # rl_zoo3 searches it


def test_stock_policies_are_searched_as_rl_zoo3_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "dqn.yml"
    config.write_text("CartPole-v1:\n  n_timesteps: 500\n  policy: MlpPolicy\n  policy_kwargs: dict(normalize_images=False)\n")
    trial = optuna.create_study().ask()
    model = model_of(optimising("dqn", "CartPole-v1", tmp_path, config), trial, monkeypatch)
    assert not [name for name in trial.params if name.startswith("flipout_")]
    assert "exploration_final_eps" in trial.params
    assert model.policy_kwargs.keys() == {"net_arch"}


@pytest.mark.parametrize("algo", sorted(HYPERPARAMS_SAMPLER.keys() - {"ars"}))
def test_every_choice_is_a_policy_and_can_be_made_again(algo: str) -> None:
    """Thirty trials each; settings that do not fit together would be refused, and what was chosen is converted to the same."""
    env = "Pendulum-v1" if algo in ("sac", "td3", "ddpg", "tqc", "crossq") else "CartPole-v1"
    kind: type[BaseAlgorithm] = ALGOS[algo]
    policy = "FlipoutMlpLstmPolicy" if algo == "ppo_lstm" else "FlipoutMlpPolicy"
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for number in range(30):
        trial = study.ask()
        with search.given(algo, dict(policy=policy, policy_kwargs={})):
            chosen = HYPERPARAMS_SAMPLER[algo](trial, 1, 1, dict(NO_ARGS))
        again = HYPERPARAMS_CONVERTER[algo](dict(trial.params))
        assert again["policy_kwargs"] == chosen["policy_kwargs"]
        assert {k: v for k, v in again.items() if not k.startswith("noise_")} == {
            k: v for k, v in chosen.items() if k != "action_noise"
        }
        if number < 10:
            others = chosen if algo == "flipes" else {}  # of the others, the stock ones are rl_zoo3's matter
            kind(policy, env, **{**others, "policy_kwargs": chosen["policy_kwargs"]}, device="cpu")


def test_members_learn_from_their_own_targets() -> None:
    """The YAML writes out the target noise of a policy without members; a trial that has them gives what they need."""
    study, found = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)), set()
    for _ in range(20):
        with search.given("dqn", dict(policy="FlipoutMlpPolicy", policy_kwargs=dict(target_noise="independent"))):
            kwargs = HYPERPARAMS_SAMPLER["dqn"](study.ask(), 1, 1, dict(NO_ARGS))["policy_kwargs"]
        found.add((kwargs["members"] is not None, kwargs["target_noise"]))
    assert found == {(True, "same"), (False, "independent")}


def test_the_environments_of_the_evaluation_are_those_of_the_training(tmp_path: Path) -> None:
    config = tmp_path / "dqn.yml"
    config.write_text("CartPole-v1:\n  n_timesteps: 500\n  policy: MlpPolicy\n  env_kwargs:\n    max_episode_steps: 7\n")
    made, asked = manager_of("dqn", "CartPole-v1", config), manager_of("dqn", "CartPole-v1", config, eval_env_kwargs={"a": 1})
    for one in (made, asked):
        one.read_hyperparameters()
    assert made.eval_env_kwargs == {"max_episode_steps": 7}
    assert asked.eval_env_kwargs == {"a": 1}  # what the command line says goes before


@pytest.mark.parametrize("algo", ["dqn", "qrdqn"])
def test_members_and_batch_are_not_searched_where_one_is_made_for_the_other(algo: str) -> None:
    trial = optuna.create_study().ask()
    given = dict(members=20, keys_per_transition=20)
    with search.given(algo, dict(policy="FlipoutMlpPolicy", policy_kwargs=given, batch_size=1280)):
        chosen = HYPERPARAMS_SAMPLER[algo](trial, 1, 1, dict(NO_ARGS))
    assert not {"flipout_members", "batch_size_pow"} & trial.params.keys()
    assert chosen["policy_kwargs"]["members"] == 20 and chosen["batch_size"] == 1280 == trial.user_attrs["batch_size"]
    assert "batch_size" not in HYPERPARAMS_CONVERTER[algo](dict(trial.params)), "made again, the YAML's stays"
    ALGOS[algo](env="CartPole-v1", policy="FlipoutMlpPolicy", **chosen, device="cpu", buffer_size=100)


@pytest.mark.parametrize(
    "given",
    [
        dict(members=10, bootstrap=0.5, reward_noise=0.1),
        dict(members=20, keys_per_transition=20, bootstrap=0.5),
        dict(noise_sharing="shared", family="factorised"),
        dict(base_every_steps=100),
        dict(init="noisynet", family="factorised"),
    ],
    ids=str,
)
def test_a_trial_chooses_what_fits_the_yaml(given: dict[str, Any]) -> None:
    """Else its policy would be refused, and the study end."""
    study, chosen = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)), []
    for _ in range(40):
        with search.given("dqn", dict(policy="FlipoutMlpPolicy", policy_kwargs=given)):
            chosen.append(HYPERPARAMS_SAMPLER["dqn"](study.ask(), 1, 1, dict(NO_ARGS))["policy_kwargs"])
        ValueSettings(**{name: value for name, value in chosen[-1].items() if name != "net_arch"})
    without_choice = {"noise_sharing", "base_every_steps", "keys_per_transition"} & given.keys()
    assert len({one.get("members") for one in chosen}) == (1 if without_choice else 3)
    assert len({one["family"] for one in chosen}) == {"init": 1, "base_every_steps": 2}.get(next(iter(given)), 3)


def test_what_is_of_members_alone_goes_with_them_when_a_trial_is_made_again() -> None:
    """A trial without members, on a YAML that has them and bootstrap."""
    again = HYPERPARAMS_CONVERTER["dqn"](
        dict(one_minus_gamma=0.01, net_arch="small", flipout_family="gaussian", flipout_sigma_init=1.0)
        | dict(flipout_resample="step", flipout_schedule="constant", flipout_learn_sigma=False, flipout_members=0)
    )
    assert again["policy_kwargs"]["members"] is None
    assert (again["policy_kwargs"]["bootstrap"], again["policy_kwargs"]["reward_noise"]) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("params", "match"),
    [
        (dict(flipout_family="cauchy"), "flipout_family, which is one of"),
        (dict(flipout_sigma_init=0.5), "has nothing for flipout_family"),
        ("newer", "does not know: temperature"),
    ],
)
def test_trials_of_another_version_are_refused(params: Any, match: str) -> None:
    trial = optuna.create_study().ask()
    with search.given("ppo", dict(policy="FlipoutMlpPolicy", policy_kwargs={})):
        HYPERPARAMS_SAMPLER["ppo"](trial, 1, 1, dict(NO_ARGS))
    stock = {name: value for name, value in trial.params.items() if not name.startswith("flipout_")}
    own = {**trial.params, "flipout_temperature": 1.0} if params == "newer" else params
    with pytest.raises(ValueError, match=match):
        HYPERPARAMS_CONVERTER["ppo"]({**stock, **own})


@pytest.mark.parametrize("trial_id", [0, 1])
def test_a_trial_is_made_again_with_the_settings_of_the_yaml(trial_id: int, tmp_path: Path) -> None:
    """Trial 0, too, which rl_zoo3 leaves out; and noise_type=None, which it hands to TD3."""
    storage, name = str(tmp_path / "study.log"), "again"
    made = optimising("td3", "Pendulum-v1", tmp_path)
    plain = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(storage))
    study = optuna.create_study(storage=plain, study_name=name)
    chosen = []
    for noise_type in ("normal", None):
        study.enqueue_trial(dict(noise_type=noise_type, noise_std=0.1))
        trial = study.ask()
        with search.given("td3", made._hyperparams):
            chosen.append(HYPERPARAMS_SAMPLER["td3"](trial, 1, 1, dict(NO_ARGS)))
    again = manager_of("td3", "Pendulum-v1", storage=storage, study_name=name, trial_id=trial_id)
    found, saved = again.read_hyperparameters()
    assert found["policy_kwargs"] == chosen[trial_id]["policy_kwargs"]
    assert found["learning_starts"] == 10000  # the YAML's, which is not searched
    assert found.get("noise_type", "absent") == ("normal", "absent")[trial_id]
    assert dict(saved) == found


def test_a_trial_that_there_is_not_is_refused(tmp_path: Path) -> None:
    storage = str(tmp_path / "study.log")
    with pytest.raises(ValueError, match="there is no file"):
        manager_of("ppo", "CartPole-v1", storage=storage, study_name="a", trial_id=0).read_hyperparameters()
    assert not list(tmp_path.iterdir())
    optuna.create_study(storage=manager.storages.open_storage(storage), study_name="a")
    again = manager_of("ppo", "CartPole-v1", storage=storage, study_name="a", trial_id=3)
    with pytest.raises(ValueError, match="one of the 0 trials of 'a', got 3"):
        again.read_hyperparameters()


def test_a_trial_of_another_algorithm_is_refused(tmp_path: Path) -> None:
    storage = str(tmp_path / "study.log")
    plain = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(storage))
    optuna.create_study(storage=plain, study_name="a").ask().suggest_float("learning_rate", 0.1, 1)
    again = manager_of("ppo", "CartPole-v1", storage=storage, study_name="a", trial_id=0)
    with pytest.raises(ValueError, match="which ppo needs: it is another algorithm's"):
        again.read_hyperparameters()


def test_settings_of_the_command_line_are_the_same_when_a_trial_is_made_again(tmp_path: Path) -> None:
    """They stand for those of the YAML, in the search and afterwards: what a trial has chosen goes before them."""
    storage, custom = str(tmp_path / "study.log"), dict(policy_kwargs=dict(net_arch=[16], sigma_init=3.0, perturb="heads"))
    made = optimising("ppo", "CartPole-v1", tmp_path, hyperparams=dict(custom))
    plain = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(storage))
    trial = optuna.create_study(storage=plain, study_name="a").ask()
    with search.given("ppo", made._hyperparams):
        chosen = HYPERPARAMS_SAMPLER["ppo"](trial, 1, 1, dict(NO_ARGS))["policy_kwargs"]
    again = manager_of("ppo", "CartPole-v1", storage=storage, study_name="a", trial_id=0, hyperparams=dict(custom))
    found, _ = again.read_hyperparameters()
    assert found["policy_kwargs"] == chosen and chosen["perturb"] == "heads" and chosen["sigma_init"] < 3


def test_ctrl_c_ends_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = str(tmp_path / "study.log")
    made = optimising("ppo", "CartPole-v1", tmp_path, storage=storage, study_name="a", max_total_trials=3)
    calls: list[int] = []

    def stopped(self: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(ALGOS["ppo"], "learn", stopped)
    monkeypatch.setattr(optuna.Study, "best_trial", property(lambda self: self.trials[0]))  # of none that is complete
    monkeypatch.chdir(tmp_path)
    made.hyperparameters_optimization()
    assert calls == [1]


def test_a_worker_that_goes_on_chooses_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """rl_zoo3 makes a sampler of the seed each time: with the same one it would begin with the choices that it has made."""
    storage = str(tmp_path / "study.log")
    made = optimising("ppo", "CartPole-v1", tmp_path, storage=storage, study_name="a", max_total_trials=2, seed=5)
    left, seeds = iter([True, True, False]), []
    monkeypatch.setattr(manager.studies, "await_others", lambda study, total: next(left))

    def original(self: Any) -> None:
        seeds.append(self.seed)
        plain = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(storage))
        optuna.load_study(storage=plain, study_name="a").add_trial(optuna.trial.create_trial(value=1.0))

    manager._hyperparameters_optimization(original, made)
    assert len(set(seeds)) == 3 and seeds[0] == 5


def test_a_rollout_buffer_by_name_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "ppo.yml"
    config.write_text("CartPole-v1:\n  n_timesteps: 500\n  policy: MlpPolicy\n  rollout_buffer_class: a.B\n")
    with pytest.raises(ValueError, match="hands the name on as a text"):
        manager_of("ppo", "CartPole-v1", config).read_hyperparameters()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # rl_zoo3 has opened a monitor's file by then
def test_a_typo_in_a_noise_option_is_told_before_training(tmp_path: Path) -> None:
    config = tmp_path / "ppo.yml"
    config.write_text("CartPole-v1:\n  n_timesteps: 500\n  policy: FlipoutMlpPolicy\n  policy_kwargs: dict(sigma_innit=0.3)\n")
    made = manager_of("ppo", "CartPole-v1", config, eval_freq=-1)
    made.save_path, made.params_path = str(tmp_path), str(tmp_path)
    with pytest.raises((TypeError, ValueError), match=r"sigma_innit.*sigma_init"):
        made.setup_experiment()


@pytest.mark.parametrize(("algo", "votes"), [("ppo", False), ("dqn", True)])
def test_the_pruner_is_told_what_will_be_used(algo: str, votes: bool, tmp_path: Path) -> None:
    """Trials are evaluated by NoiseEvalCallback, and stopped where the pruner says so."""

    class Always(optuna.pruners.BasePruner):
        def prune(self, study: Any, trial: Any) -> bool:
            return True

    config = tmp_path / f"{algo}.yml"
    kwargs = "dict(members=5, keys_per_transition=2)" if votes else "dict()"
    greedy = "  exploration_initial_eps: 0.0\n  exploration_final_eps: 0.0\n" if votes else ""
    config.write_text(f"CartPole-v1:\n  n_timesteps: 500\n  policy: FlipoutMlpPolicy\n  policy_kwargs: {kwargs}\n{greedy}")
    made = optimising(algo, "CartPole-v1", tmp_path, config)
    seen: list[Any] = []

    class Noted(manager.NoiseTrialCallback):
        def _init_callback(self) -> None:
            super()._init_callback()
            seen.append(self)

    study = optuna.create_study(pruner=Always(), sampler=optuna.samplers.RandomSampler(seed=1))
    study.enqueue_trial(dict(n_steps_pow=5, batch_size_pow=5, n_epochs=1, net_arch="small"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manager, "NoiseTrialCallback", Noted)
        study.optimize(made.objective, n_trials=1)
    (trial,) = study.trials
    assert trial.state == optuna.trial.TrialState.PRUNED
    assert isinstance(seen[0], NoiseEvalCallback) and seen[0].best_by == ("vote" if votes else "mean")
    assert trial.intermediate_values == {1: seen[0].returns[seen[0].best_by][0]}
