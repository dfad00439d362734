"""The search space in rl_zoo3's tables: the noise beside its own options, and what the YAML says where nothing is searched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from sb3_flipout.policies import FlipoutPolicyMixin
from sb3_flipout.zoo.space import PREFIX, Options, remembered, suggested

Sampler = Callable[[Any, int, int, dict[str, Any]], Options]
Converter = Callable[[Options], Options]

# What takes the place of weight noise, and would come back if it were searched: kept as the YAML has it.
_KEPT = ("exploration_initial_eps", "exploration_final_eps", "exploration_fraction")

# ---- what the YAML gives ---------------------------------------------------------------------------------------------

_GIVEN: ContextVar[Mapping[str, Any] | None] = ContextVar("hyperparameters of the YAML", default=None)


@contextmanager
def given(algo: str, hyperparams: Mapping[str, Any]) -> Iterator[None]:
    """
    Say which hyperparameters the trials of this thread start from, if it is weight noise that they explore by.

    :param algo: Name of the algorithm, as ``--algo`` takes it
    :param hyperparams: Those of the YAML, as the algorithm is built with
    :return: Context manager
    """
    token = _GIVEN.set(hyperparams if is_flipout(algo, hyperparams.get("policy")) else None)
    try:
        yield
    finally:
        _GIVEN.reset(token)


def is_flipout(algo: str, policy: Any) -> bool:
    """
    Tell whether a policy explores by weight noise.

    :param algo: Name of the algorithm, as ``--algo`` takes it
    :param policy: Policy class, its name, or its dotted name
    :return: Whether it does
    """
    from rl_zoo3 import ALGOS
    from rl_zoo3.utils import get_class_by_name

    if isinstance(policy, str):
        policy = get_class_by_name(policy) if "." in policy else getattr(ALGOS[algo], "policy_aliases", {}).get(policy)
    return isinstance(policy, type) and issubclass(policy, FlipoutPolicyMixin)


def searches_noise() -> bool:
    """
    Tell whether the trials of this thread explore by weight noise.

    :return: Whether they do
    """
    return _GIVEN.get() is not None


def _learns(algo: str) -> str:
    from rl_zoo3 import ALGOS

    if issubclass(ALGOS[algo], OnPolicyAlgorithm):
        return "rollouts"
    return "values" if algo in ("dqn", "qrdqn") else "actors"


def with_noise(stock: Options, noise: Mapping[str, Any], yaml_kwargs: Mapping[str, Any] | None = None) -> Options:
    """
    Join what rl_zoo3 has chosen, what we have, and what the YAML says of the policy.

    :param stock: rl_zoo3's choice
    :param noise: Ours
    :param yaml_kwargs: ``policy_kwargs`` of the YAML, for all that is not chosen
    :return: Hyperparameters
    """
    return {**stock, "policy_kwargs": {**(yaml_kwargs or {}), **stock.get("policy_kwargs", {}), **noise}}


class _Trial:
    """A trial in which some options are not asked for: they are as the YAML has them."""

    def __init__(self, trial: Any, kept: Mapping[str, Any]) -> None:
        self._trial, self._kept = trial, kept

    def set_user_attr(self, name: str, value: Any) -> None:
        """
        Note what is used.

        :param name: Name
        :param value: Value, of what is searched
        """
        self._trial.set_user_attr(name, self._kept.get(name, value))

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._trial, name)
        if not name.startswith("suggest_"):
            return found
        return lambda option, *args, **kwargs: self._kept[option] if option in self._kept else found(option, *args, **kwargs)


def _sampler(algo: str, stock: Sampler) -> Sampler:
    @wraps(stock)
    def sample(trial: Any, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> Options:
        hyperparams = _GIVEN.get()
        if hyperparams is None:
            return stock(trial, n_actions, n_envs, additional_args)
        kept = {name: hyperparams[name] for name in _KEPT if name in hyperparams}
        yaml_kwargs = hyperparams.get("policy_kwargs") or {}
        in_copies = yaml_kwargs.get("keys_per_transition", 1) > 1 and "batch_size" in hyperparams
        if in_copies:  # the batch is made of repeated transitions, and rl_zoo3 tries powers of two
            kept |= {"batch_size_pow": 0, "batch_size": hyperparams["batch_size"]}
        chosen = stock(_Trial(trial, kept), n_actions, n_envs, additional_args)
        if in_copies:
            chosen["batch_size"] = hyperparams["batch_size"]
        if algo == "flipes":
            return with_noise(chosen, {}, yaml_kwargs)
        return with_noise(chosen, suggested(trial, _learns(algo), yaml_kwargs), yaml_kwargs)

    sample.of_sb3_flipout = True  # type: ignore[attr-defined]
    return sample


def _converter(algo: str, stock: Converter) -> Converter:
    @wraps(stock)
    def convert(params: Options) -> Options:
        own = {name: value for name, value in params.items() if not name.startswith(PREFIX)}
        if own.get("noise_type", "") is None:  # rl_zoo3 hands both on to the algorithm, which knows neither
            own = {name: value for name, value in own.items() if name not in ("noise_type", "noise_std")}
        noise = remembered(params, _learns(algo))
        return with_noise(stock(own), noise) if noise else stock(own)

    convert.of_sb3_flipout = True  # type: ignore[attr-defined]
    return convert


# ---- algorithms that rl_zoo3 does not search ---------------------------------------------------------------------------


def _sample_crossq(trial: Any, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> Options:
    from rl_zoo3.hyperparams_opt import sample_sac_params

    some: Any = _Trial(trial, {"tau": None})  # it has no target network
    return sample_sac_params(some, n_actions, n_envs, additional_args)


def _without_tau(sample: Sampler) -> Sampler:
    @wraps(sample)
    def cut(*args: Any) -> Options:
        return {name: value for name, value in sample(*args).items() if name != "tau"}

    return cut


def _sample_flipes(trial: Any, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> Options:
    return _convert_flipes(
        dict(
            learning_rate=trial.suggest_float("learning_rate", 1e-3, 0.2, log=True),
            population_size_pow=trial.suggest_int("population_size_pow", 3, 8),
            shaping=trial.suggest_categorical("shaping", ["centred_ranks", "normalised"]),
            sigma_init=trial.suggest_float("sigma_init", 0.02, 1.0, log=True),
        )
    )


def _convert_flipes(params: Options) -> Options:
    chosen = dict(params)
    noise, power = dict(sigma_init=chosen.pop("sigma_init")), chosen.pop("population_size_pow")
    return {**chosen, "population_size": 2**power, "policy_kwargs": noise}


def install() -> None:
    """Put our search space around rl_zoo3's, in its tables; a second time changes nothing."""
    from rl_zoo3 import hyperparams_opt
    from rl_zoo3.hyperparams_opt import convert_offpolicy_params

    samplers: dict[str, Any] = hyperparams_opt.HYPERPARAMS_SAMPLER
    converters: dict[str, Any] = hyperparams_opt.HYPERPARAMS_CONVERTER
    samplers.setdefault("crossq", _without_tau(_sample_crossq))
    converters.setdefault("crossq", convert_offpolicy_params)
    samplers.setdefault("ppo_mask", samplers["ppo"])
    converters.setdefault("ppo_mask", converters["ppo"])
    samplers.setdefault("flipes", _sample_flipes)
    converters.setdefault("flipes", _convert_flipes)
    for algo in samplers.keys() - {"ars"}:
        if not hasattr(samplers[algo], "of_sb3_flipout"):
            samplers[algo] = _sampler(algo, samplers[algo])
            converters[algo] = _converter(algo, converters[algo])
