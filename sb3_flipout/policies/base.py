"""What all flipout policies share: their settings, their noise state, and which noise a forward pass sees.

The noise of a policy is a pure function of a few numbers, and those are all that is saved: a seed, and how many collection
steps, rollouts (or gradient steps) and evaluation calls there have been.
"""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, fields
from inspect import signature
from typing import Any, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import FlattenExtractor, NatureCNN
from stable_baselines3.common.type_aliases import Schedule
from torch import nn

from sb3_flipout.layers import perturb
from sb3_flipout.noise import EvaluationStream, KeyStream, RowNoise, fold, noise_of
from sb3_flipout.noise.ladder import checked_ladder, environment_scales
from sb3_flipout.policies.settings import NoiseSettings

F = TypeVar("F", bound=Callable[..., Any])


def _eager(function: F) -> F:
    """Keep key streams, which count in Python, out of a compiled policy's graph."""
    return th.compiler.disable(function)  # type: ignore[no-untyped-call]


# Streams derived from a policy's seed. Their keys have nothing in common.
_COLLECTION, _EVALUATION, _BASE = range(3)


class NoiseStateError(RuntimeError, ValueError):
    """A saved noise state does not fit the policy. A ``RuntimeError`` too, since SB3's ``load`` takes others for its own."""


class FlipoutPolicy(BasePolicy):
    """Mixin of all flipout policies; stands before SB3's policy class in their bases."""

    noise_settings: NoiseSettings
    # (noise,) inside a `perturbed` block, else None; (None,) when the block asks for mean weights.
    explicit_noise: tuple[RowNoise | None] | None = None

    def _init_noise(self, settings: NoiseSettings) -> None:
        """Set the noise state up; called in the constructor, after SB3 has built the stock policy."""
        self.noise_settings = settings
        self._noise_seed = _seed_of_torch()
        members = getattr(settings, "members", None)
        self._keys = KeyStream(fold(self._noise_seed, _COLLECTION), settings.resample, members)
        self._evaluation = EvaluationStream(fold(self._noise_seed, _EVALUATION), 0, members)
        self._noise_scale = 1.0
        self._noise_ladder: tuple[float, ...] | None = None
        self._row_scale: th.Tensor | None = None

    def _perturb(self, modules: list[nn.Module]) -> None:
        """Perturb modules of the policy as the settings say; their layers are numbered in this order, from 0."""
        layers = self.noise_settings.perturb if self.noise_settings.perturb in ("linear", "hidden") else "all"
        if layers == "hidden" and not any(isinstance(layer, nn.LSTM) for module in modules for layer in module.modules()):
            raise ValueError(
                f'perturb="hidden" stands for the hidden-to-hidden weights of an LSTM, and {type(self).__name__} has none. '
                'Use "policy", "heads", "linear" or "all".'
            )
        perturb(nn.ModuleList(modules), layers, self._base_key(0), **asdict(self.noise_settings.layer_noise()))

    def _base_key(self, draw: int) -> int:
        """Key of a draw of the base, by its number."""
        return fold(self._noise_seed, _BASE, draw)

    def _make_optimizer(self, parameters: Iterable[nn.Parameter], lr_schedule: Schedule) -> th.optim.Optimizer:
        """
        Make SB3's optimizer over parameters that include sigma.

        Sigma makes the tensors half as many again, and torch's default optimizers walk over them in Python, so the fused
        implementation is asked for, where it exists and the user has not chosen. It rounds differently from the default
        one in the last bit; without learned sigma, where training must equal stock SB3's, the default one stays.
        """
        kwargs = dict(self.optimizer_kwargs)
        learned = self.noise_settings.learn_sigma and self.noise_settings.layer_noise().spec.sigma == "per_weight"
        if (
            learned
            and "fused" in signature(self.optimizer_class).parameters
            and not {"fused", "foreach", "differentiable"} & kwargs.keys()
        ):
            kwargs["fused"] = True
        return self.optimizer_class(parameters, lr=lr_schedule(1), **kwargs)  # type: ignore[call-arg]

    # ---- what the user sets -------------------------------------------------------------------------------------

    @property
    def noise_scale(self) -> float:
        """Noise scale c, the number that multiplies every perturbation; 0 gives mean weights. Saved with the model."""
        return self._noise_scale

    @noise_scale.setter
    def noise_scale(self, scale: float) -> None:
        if isinstance(scale, bool) or not isinstance(scale, (int, float, np.floating, np.integer)):
            raise TypeError(f"noise_scale must be a number >= 0, got {type(scale).__name__}.")
        if not (math.isfinite(scale) and scale >= 0):
            raise ValueError(f"noise_scale must be finite and >= 0, got {scale}; use 0.0 to switch the noise off.")
        self._noise_scale, self._row_scale = float(scale), None

    @property
    def noise_ladder(self) -> tuple[float, ...] | None:
        """What multiplies the noise scale in each training environment; ``None`` for no ladder. Saved with the model."""
        return self._noise_ladder

    @noise_ladder.setter
    def noise_ladder(self, ladder: tuple[float, ...] | None) -> None:
        self._noise_ladder, self._row_scale = checked_ladder(ladder), None

    # ---- which noise a forward pass sees ------------------------------------------------------------------------

    @_eager
    def _collection_noise(self, n_envs: int) -> RowNoise:
        """Noise of the next collection step: one row per environment. The only place that advances the training noise."""
        if self._row_scale is None or len(self._row_scale) != n_envs or self._row_scale.device != self.device:
            self._row_scale = environment_scales(self._noise_scale, self._noise_ladder, n_envs, self.device)
        return self._keys.next(n_envs, self._row_scale)

    @_eager
    def _prediction_noise(self, obs: Any, deterministic: bool) -> RowNoise | None:
        """Noise of a prediction outside collection: mean weights, or fresh keys that training never sees."""
        if deterministic:
            return None
        return self._evaluation.next(n_rows(obs), self._noise_scale, self.device)

    def _replayed_noise(self, obs: Any, needed: bool) -> RowNoise | None:
        """Noise that a batch brings with it, or mean weights where none is needed."""
        noise = noise_of(obs)
        if noise is None and needed:
            raise ValueError(
                "a batch without noise keys reached the policy in training mode, so its noise cannot be replayed. Batches of "
                "the registered algorithms carry them; for an algorithm of your own call sb3_flipout.register(YourAlgorithm), "
                "and to train the mean weights (behaviour cloning) write `with sb3_flipout.perturbed(policy, None):` around "
                "the call. To look at a policy that is not being trained, call policy.set_training_mode(False) first."
            )
        return noise

    # ---- what the algorithm tells -------------------------------------------------------------------------------

    @abstractmethod
    def begin_rollout(self) -> None:
        """Tell that a rollout starts."""

    @abstractmethod
    def collecting(self, n_envs: int) -> AbstractContextManager[None]:
        """
        Mark collection: forward passes inside it act in the training environments.

        :param n_envs: Number of environments
        :return: Context manager
        """

    @abstractmethod
    def updating(self) -> AbstractContextManager[None]:
        """
        Mark the update.

        :return: Context manager
        """

    def end_episodes(self, dones: np.ndarray) -> None:
        """
        Tell which environments have ended their episode.

        :param dones: One flag per environment, shape (n_envs,)
        """
        self._keys.end_episodes(np.asarray(dones, dtype=bool))

    # ---- save and load ------------------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Any]:
        """
        Give the noise state; torch puts it into ``state_dict``.

        :return: Settings, seed, counters and noise scale, as plain Python values
        """
        return {
            "settings": asdict(self.noise_settings),
            "seed": self._noise_seed,
            "steps": self._keys.step,
            "evaluations": self._evaluation.calls,
            "noise_scale": self._noise_scale,
            "noise_ladder": self._noise_ladder,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """
        Continue from a saved noise state.

        :param state: What :meth:`get_extra_state` gave
        """
        self._noise_seed = state["seed"]
        self._keys.restart(state["steps"], fold(self._noise_seed, _COLLECTION))
        self._evaluation.seed, self._evaluation.calls = fold(self._noise_seed, _EVALUATION), state["evaluations"]
        self.noise_scale, self.noise_ladder = state["noise_scale"], state.get("noise_ladder")

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """
        Load parameters and noise state, after checking that the noise settings fit.

        :param state_dict: What ``state_dict`` gave
        :param strict: Whether all names must match
        :param assign: Whether to keep the given tensors instead of copying them
        :return: Missing and unexpected keys, as torch gives them
        :raises NoiseStateError: If the state was saved under other noise settings, or by a policy that is no flipout policy
        """
        saved = state_dict.get("_extra_state")
        if saved is None and strict:
            raise NoiseStateError(
                "the saved policy is no flipout policy: it has no noise state. Load it into the policy it was saved from, "
                "and copy its weights with load_state_dict(..., strict=False) if they are what you want."
            )
        if saved is not None:
            self._check_settings(saved["settings"])
        return super().load_state_dict(state_dict, strict, assign)

    def _check_settings(self, saved: dict[str, Any]) -> None:
        own = asdict(self.noise_settings)
        differing = [
            f"{name}: saved {saved.get(name)!r}, here {value!r}" for name, value in own.items() if saved.get(name) != value
        ]
        if differing:
            raise NoiseStateError(
                f"the saved noise settings do not fit this policy ({'; '.join(differing)}). Build it with the saved settings, "
                'for a saved model by Algorithm.load(path, custom_objects={"policy_kwargs": dict(...)}).'
            )

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), **asdict(self.noise_settings)}

    def to_plain_policy(self) -> BasePolicy:
        """
        Give SB3's own policy with the mean weights, for export and for use without this package.

        Of an ensemble (``members``) that is neither the vote nor any member, and the prior is left out.

        :return: Stock policy on the same device; its optimizer is new
        """
        plain_class: Any = next(base for base in type(self).__mro__ if not issubclass(base, FlipoutPolicy))
        noise_names = {field.name for field in fields(self.noise_settings)}
        arguments = {name: value for name, value in self._get_constructor_parameters().items() if name not in noise_names}
        with th.random.fork_rng(devices=[]):  # the initialisation, overwritten at once, must not move the global generator
            plain: BasePolicy = plain_class(**arguments)
        own = self.state_dict()
        plain.load_state_dict({name: own[name] for name in plain.state_dict()})
        plain.set_training_mode(self.training)
        return plain.to(self.device)


def _seed_of_torch() -> int:
    """
    Seed the noise by the state of torch's generator: read, not drawn, so that it stays as stock SB3 leaves it.

    The state counts as well as the seed, so that two models made one after the other explore by different noise.
    """
    state = hashlib.blake2b(th.get_rng_state().numpy().tobytes(), digest_size=8)
    return fold(th.initial_seed(), int.from_bytes(state.digest(), "little"))


def n_rows(obs: Any) -> int:
    """
    Count the rows of a batch of observations.

    :param obs: Tensor, or dictionary of tensors
    :return: Size of the first dimension
    """
    return len(next(iter(obs.values()))) if isinstance(obs, dict) else len(obs)


def check_extractor(observation_space: spaces.Space[Any], policy_class: type, kwargs: Mapping[str, Any]) -> None:
    """
    Refuse dictionary observations for extractors of single ones; SB3 does so for its own policy names only.

    :param observation_space: Observation space
    :param policy_class: Policy class, whose constructor says which features extractor is the default
    :param kwargs: Keyword arguments of the policy
    :raises ValueError: If the space and the extractor do not fit
    """
    constructors = (vars(base)["__init__"] for base in policy_class.__mro__ if "__init__" in vars(base))
    defaults = (signature(constructor).parameters.get("features_extractor_class") for constructor in constructors)
    default = next(parameter.default for parameter in defaults if parameter is not None)
    extractor = kwargs.get("features_extractor_class", default)
    if isinstance(observation_space, spaces.Dict) and extractor in (FlattenExtractor, NatureCNN):
        raise ValueError(
            'the observation space is a Dict, which needs "FlipoutMultiInputPolicy" (or a features_extractor_class of your '
            f"own), got a policy with {extractor.__name__}."
        )
