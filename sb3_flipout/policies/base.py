"""What all flipout policies share: their settings, their noise, and which noise a forward pass sees.

The noise of a policy is a pure function of a few numbers: a seed, and how many collection steps, rollouts (or gradient steps)
and evaluation calls there have been. They are no weights: ``state_dict`` has tensors only. The algorithm saves them beside its
own data (:mod:`sb3_flipout.hooks`), so a resumed training continues its noise, and copied weights bring none.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from inspect import signature
from typing import Any, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import FlattenExtractor, NatureCNN
from stable_baselines3.common.type_aliases import Schedule
from torch import nn

from sb3_flipout.checks import check_integer, check_number
from sb3_flipout.layers import FlipoutLayer, PerturbedNetwork
from sb3_flipout.layers.convert import Wanted, checked_patterns, perturb_named, warn_of_plain
from sb3_flipout.noise import EvaluationStream, KeyStream, NoiseOwner, RowNoise, Scales, Stream, fold, noise_of
from sb3_flipout.noise.carried import lost_by
from sb3_flipout.noise.ladder import checked_ladder
from sb3_flipout.policies.guard import VisitGuard
from sb3_flipout.policies.legacy import translated_settings, with_bases
from sb3_flipout.policies.plain import plain_copy
from sb3_flipout.policies.rows import give_layouts
from sb3_flipout.policies.settings import NoiseSettings

F = TypeVar("F", bound=Callable[..., Any])


def eager(function: F) -> F:
    """
    Keep what counts in Python out of a compiled policy's graph.

    :param function: Function
    :return: The same, for torch.compile to leave alone
    """
    return th.compiler.disable(function)  # type: ignore[no-untyped-call]


class NoiseStateError(RuntimeError, ValueError):
    """A saved noise state does not fit the policy. A ``RuntimeError`` too, since SB3's ``load`` takes others for its own."""


class RunMarks:
    """What a policy knows of the run that goes on. Copies of it are blank: a copied policy takes part in no run yet."""

    def __init__(self) -> None:
        self.told: set[str] = set()  # what the algorithm is telling right now, so that it is told once
        self.collects = False  # a rollout is being collected
        self.step_due = False  # the algorithm's next collection step has not been made yet
        self.updates = False  # SB3's `train` is running
        self.acted_unmarked = False  # somebody acts under noise whom no algorithm has announced
        self.warned: set[str] = set()

    def __reduce__(self) -> Any:
        return RunMarks, ()


class FlipoutPolicyMixin(BasePolicy):
    """Mixin of all flipout policies; stands before SB3's policy class in their bases."""

    noise_settings: NoiseSettings
    #: The network of the layers that act; what rows see is said there and nowhere else.
    perturbed_network: PerturbedNetwork

    def _init_noise(self, settings: NoiseSettings) -> None:
        """Set the noise up; called in the constructor, after SB3 has built the stock policy."""
        self.noise_settings = settings
        self.noise_owner = NoiseOwner()
        self.marks = RunMarks()
        self.guard = VisitGuard()
        self._noise_seed = _seed_of_torch()
        members = self.members
        self._keys = KeyStream(fold(self._noise_seed, Stream.COLLECTION), settings.resample, members, self.noise_owner)
        self._evaluation = EvaluationStream(fold(self._noise_seed, Stream.EVALUATION), 0, members, self.noise_owner)
        self._noise_scale = 1.0
        self._schedule_factor = settings.factor_at(0.0)
        self._noise_ladder: tuple[float, ...] | None = None
        checked_patterns(settings.skip, [name for name, _ in self.named_modules()])

    def _perturb(self, modules: Sequence[nn.Module], quietly: bool = False) -> None:
        """
        Perturb modules of the policy as the settings say; their layers are numbered in this order, from 0.

        :param modules: Modules; with each all that are in it
        :param quietly: Whether to say nothing of layers that stay plain: it has been said of another network of this form
        """
        settings = self.noise_settings
        if settings.layers == "hidden" and not any(
            isinstance(layer, (nn.LSTM, nn.GRU)) for module in modules for layer in module.modules()
        ):
            raise ValueError(
                'layers="hidden" stands for the hidden-to-hidden weights of LSTMs and GRUs, and what is perturbed of '
                f'{type(self).__name__} has none. Use layers="all" or "linear".'
            )
        known = {id(module): name for name, module in reversed(list(self.named_modules(remove_duplicate=False)))}
        inside = [layer for module in modules for layer in module.modules()]
        names = {known.get(id(layer), f"{type(layer).__name__} {i}"): layer for i, layer in enumerate(inside)}
        wanted = Wanted(settings.layers, tuple(settings.skip), settings.perturb_frozen)
        left = perturb_named(names, settings.layer_noise(), wanted, lambda: self._base_key(0))
        if not quietly:
            warn_of_plain(left, stacklevel=6)

    def _find_layouts(self, network: PerturbedNetwork, run: Callable[[Any], Any]) -> None:
        """Find out where the rows of a batch lie in what the layers of a network get."""
        names = {layer: name for name, layer in self.named_modules() if isinstance(layer, FlipoutLayer)}
        give_layouts({names[layer]: layer for layer in network.layers if layer in names}, run, self)

    def _base_key(self, draw: int) -> int:
        """Key of a draw of the base, by its number."""
        return fold(self._noise_seed, Stream.BASE, draw)

    def _make_optimizer(self, parameters: Iterable[nn.Parameter], lr_schedule: Schedule) -> th.optim.Optimizer:
        """
        Make SB3's optimizer over parameters that include sigma.

        Sigma makes the tensors half as many again, and torch's default optimizers walk over them in Python, so the fused
        implementation is asked for, where it exists and the user has not chosen. It rounds differently from the default
        one in the last bit; without learned sigma, where training must equal stock SB3's, the default one stays.
        """
        kwargs = dict(self.optimizer_kwargs)
        chosen = kwargs | getattr(self.optimizer_class, "keywords", {})  # what a functools.partial has chosen
        learned = self.noise_settings.learn_sigma and self.noise_settings.layer_noise().spec.sigma == "per_weight"
        if (
            learned
            and "fused" in signature(self.optimizer_class).parameters
            and not {"fused", "foreach", "differentiable"} & chosen.keys()
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
        self._noise_scale = check_number("noise_scale", scale, hint="Use 0.0 to switch the noise off.")

    @property
    def noise_ladder(self) -> tuple[float, ...] | None:
        """What multiplies the noise scale in each training environment; ``None`` for no ladder. Saved with the model."""
        return self._noise_ladder

    @noise_ladder.setter
    def noise_ladder(self, ladder: tuple[float, ...] | None) -> None:
        self._noise_ladder = checked_ladder(ladder)

    @property
    def members(self) -> int | None:
        """Number of members of the implicit ensemble; ``None`` where there is none."""
        members: int | None = getattr(self.noise_settings, "members", None)
        return members

    @property
    def redraws_base(self) -> bool:
        """Whether the base perturbation that acts is redrawn in training."""
        settings: Any = self.noise_settings
        every = [getattr(settings, name, None) for name in ("base_every_rollouts", "base_every_steps")]
        return any(period is not None for period in every)

    @property
    def effective_scale(self) -> float:
        """What perturbations are multiplied by now: the noise scale, times what the schedule has left of it."""
        return self._noise_scale * self._schedule_factor

    def follow_schedule(self, progress: float) -> None:
        """
        Let the noise fall as the setting ``schedule`` says; the algorithm tells the progress.

        :param progress: Share of training that is done
        """
        self._schedule_factor = self.noise_settings.factor_at(progress)

    def leave_schedule(self) -> None:
        """Let a callback steer the noise scale: until the next training, the setting ``schedule`` has no effect."""
        self._schedule_factor = 1.0

    def reseed_noise(self, seed: int) -> None:
        """
        Explore by other noise from now on; counters go on. The base changes when it is next redrawn. Members stay who they
        are: their base is a weight.

        :param seed: Seed, any integer
        :raises TypeError: If it is no integer
        """
        self._set_noise_seed(fold(0, check_integer("seed", seed)))

    def _set_noise_seed(self, seed: int) -> None:
        self._noise_seed = seed
        self._keys.restart(self._keys.step, fold(seed, Stream.COLLECTION))
        self._evaluation.seed = fold(seed, Stream.EVALUATION)

    # ---- which noise a forward pass sees ------------------------------------------------------------------------

    @eager
    def _collection_noise(self, n_envs: int) -> RowNoise:
        """Noise of the next collection step: one row per environment. The only place that advances the training noise."""
        return self._keys.next(n_envs, Scales(self.effective_scale, self._noise_ladder), self.device)

    @eager
    def _prediction_noise(self, obs: Any, deterministic: bool) -> RowNoise | None:
        """Noise of a prediction outside collection: mean weights, or fresh keys that training never sees."""
        if deterministic:
            return None
        return self._evaluation.next(n_rows(obs), self.effective_scale, self.device)

    @eager
    def _own_noise(self, obs: Any) -> RowNoise | None:
        """Noise that a batch brings with it, if it is this policy's: others' perturb other weights."""
        noise = noise_of(obs)
        return noise if noise is not None and noise.owner in (None, self.noise_owner) else None

    def _check_brought(self, obs: Any, noise: RowNoise | None) -> None:
        """In an update every batch has to bring its noise."""
        if noise is not None or not self.marks.updates:
            return
        operation, others = lost_by(obs), noise_of(obs)
        if others is not None:
            cause = "its keys were drawn by another policy"
        elif operation is not None:
            cause = f"it had keys and lost them in the operation {operation!r}"
        else:
            cause = "it never had any"
        raise ValueError(
            f"a batch reached {type(self).__name__} in an update without its noise keys, so its noise cannot be replayed: {cause}. "
            "Batches of the rollout buffer carry them on their observations. A buffer with a `get` of its own hangs them on by "
            "sb3_flipout.noise.with_noise(observations, self.row_noise(batch_inds)); an operation that changes rows hands them on "
            "by with_noise(result, noise_of(observations)[rows]). To learn by mean weights, write "
            "`with sb3_flipout.perturbed(policy, None):` around the call."
        )

    def _said(self) -> bool:
        """Whether somebody has said what the rows see: a ``perturbed`` block, or a method of the policy that calls another."""
        return self.perturbed_network.active is not None

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

    def end_step(self, dones: np.ndarray) -> None:
        """
        Tell that a collection step has been made, and which environments have ended their episode with it.

        :param dones: One flag per environment, shape (n_envs,)
        """
        self.marks.step_due = True
        self.end_episodes(dones)

    def end_episodes(self, dones: np.ndarray) -> None:
        """
        Tell which environments have ended their episode.

        :param dones: One flag per environment, shape (n_envs,)
        """
        self._keys.end_episodes(np.asarray(dones, dtype=bool))

    @contextmanager
    def once(self, what: str) -> Iterator[bool]:
        """
        Mark that the algorithm tells something. A method that calls its parent's, which tells the same, tells it once.

        :param what: Name of what is told
        :return: Context manager that gives whether it is the first to tell
        """
        first = what not in self.marks.told
        self.marks.told.add(what)
        try:
            yield first
        finally:
            if first:
                self.marks.told.discard(what)

    # ---- save and load ------------------------------------------------------------------------------------------

    def noise_state(self) -> dict[str, Any]:
        """
        Take what a resumed training has to know, as plain values; the algorithm saves it with the model.

        :return: Settings, seed, counters, noise scale and ladder
        """
        return {
            "settings": asdict(self.noise_settings),
            "seed": self._noise_seed,
            "steps": self._keys.step,
            "evaluations": self._evaluation.calls,
            "noise_scale": self._noise_scale,
            "schedule_factor": self._schedule_factor,
            "noise_ladder": self._noise_ladder,
        }

    def set_noise_state(self, state: Mapping[str, Any]) -> None:
        """
        Continue from a saved noise state.

        :param state: What :meth:`noise_state` gave
        :raises NoiseStateError: If the weights saved with it mean something else under the settings of this policy
        """
        differing = self.noise_settings.unlike(state["settings"])
        if differing:
            raise NoiseStateError(
                f"the saved weights do not fit the noise settings of this policy ({'; '.join(differing)}). Load it with the saved "
                'settings: Algorithm.load(path, custom_objects={"policy_kwargs": dict(...)}), or leave policy_kwargs out.'
            )
        self._noise_seed = int(state["seed"])
        self._keys.restart(int(state["steps"]), fold(self._noise_seed, Stream.COLLECTION))
        self._evaluation.seed, self._evaluation.calls = fold(self._noise_seed, Stream.EVALUATION), int(state["evaluations"])
        ladder = state.get("noise_ladder")
        self.noise_scale, self.noise_ladder = state["noise_scale"], None if ladder is None else tuple(ladder)
        self._schedule_factor = float(state.get("schedule_factor", 1.0))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """
        Load weights; noise is none of them.

        :param state_dict: What ``state_dict`` gave, of this policy or of one that 0.1.0 saved
        :param strict: Whether all names must match
        :param assign: Whether to keep the given tensors instead of copying them
        :return: Missing and unexpected keys, as torch gives them
        :raises NoiseStateError: If the weights are those of a policy without noise, and ``strict`` is True
        """
        state_dict = self._from_0_1_0(dict(state_dict))
        own_sigma = [name for name in self.state_dict() if name.endswith("_sigma")]
        if strict and own_sigma and not any(name.endswith("_sigma") for name in state_dict):
            raise NoiseStateError(
                "the weights are those of a policy without noise: they have no sigma. To take them as mean weights and keep the "
                'sigma that is here: model.set_parameters({"policy": weights}, exact_match=False), or '
                "policy.load_state_dict(weights, strict=False)."
            )
        return super().load_state_dict(state_dict, strict, assign)

    def _from_0_1_0(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Take the noise state out of weights that version 0.1.0 saved, and continue from it."""
        saved = state_dict.pop("_extra_state", None)
        if saved is None:
            return state_dict
        self.set_noise_state({**saved, "settings": translated_settings(saved["settings"])})
        return state_dict if self.members is None else with_bases(self, state_dict, int(saved["seed"]))

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), **asdict(self.noise_settings)}

    def to_plain_policy(self) -> BasePolicy:
        """
        Make SB3's own policy with the mean weights, for export and for use without this package.

        Of an ensemble (``members``) that is neither the vote nor any member, and the prior is left out.

        :return: Stock policy on the same device; its optimizer is new
        :raises ValueError: If it would not act as the mean weights do: a subclass changes what the stock class computes
        """
        return plain_copy(self)

    def mean_outputs(self, obs: Any) -> list[th.Tensor]:
        """
        Compute what the policy says under its mean weights, to compare it with a plain one.

        :param obs: Observations, as tensors
        :return: Everything that it computes of them
        """
        network = self.perturbed_network
        with network.activate(None) if network.layers else nullcontext():
            return self.outputs_of(self, obs)

    @staticmethod
    @abstractmethod
    def outputs_of(policy: Any, obs: Any) -> list[th.Tensor]:
        """
        Compute what a policy of this kind says, plain or not.

        :param policy: Policy
        :param obs: Observations, as tensors
        :return: Everything that it computes of them
        """


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
