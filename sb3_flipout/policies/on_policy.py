"""Policies for PPO, A2C and TRPO: explore under row noise, and replay it exactly in the update.

One transition's noise: :meth:`OnPolicyNoise.forward` draws keys, acts under them and hangs them on the log-probabilities;
the rollout buffer stores them and hands them back on the observations; :meth:`OnPolicyNoise.evaluate_actions` activates
them again. Values are replayed with the same keys; bootstrap values, asked for without keys, use mean weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.type_aliases import Schedule
from torch import nn

from sb3_flipout.layers import NoisyNetwork
from sb3_flipout.noise.rows import without_noise
from sb3_flipout.policies.base import FlipoutPolicy, check_extractor, n_rows
from sb3_flipout.policies.settings import NoiseSettings, refuse_misplaced


class OnPolicyNoise(FlipoutPolicy):
    """
    Mixin that gives an actor-critic policy its noise. What an algorithm hands over beside the observations, such as action
    masks or hidden states, passes through to the policy class behind it.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule
    :param args: Further arguments of SB3's policy
    :param family: How weights are perturbed: ``"gaussian"``, ``"factorised"``, ``"multiplicative"``, ``"dropconnect"`` or
        ``"isotropic"``
    :param sigma_init: Initial sigma in the family's unit (1/sqrt(fan_in), or relative to the mean weights); ``None``: 0.5
    :param learn_sigma: Whether sigma is trained
    :param resample: How long an environment keeps its noise: ``"step"``, ``"episode"``, ``"rollout"``, or a number of steps
    :param base_every: How often the base perturbation is redrawn, in rollouts; ``None`` for never
    :param noise_sharing: ``"flipout"``, ``"shared"`` (with ``resample="rollout"``) or ``"independent"``
    :param perturb: ``"policy"`` (all that the action depends on), ``"heads"``, ``"linear"`` (linear layers alone),
        ``"hidden"`` (of an LSTM the hidden-to-hidden weights alone) or ``"all"``
    :param init: ``"keep"`` SB3's initialisation, or ``"noisynet"``
    :param kwargs: Further keyword arguments of SB3's policy
    :raises ValueError: If a noise setting is unknown, out of range or unfit
    """

    network: NoisyNetwork
    pi_features_extractor: Any  # these three are made by SB3's policy classes
    mlp_extractor: Any
    action_net: Any
    #: Where ``deterministic`` stands among the arguments of ``forward`` and ``_predict`` after the observations.
    deterministic_at: ClassVar[int] = 0
    _collects = _updates = False

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        *args: Any,
        family: str = "gaussian",
        sigma_init: float | None = None,
        learn_sigma: bool = True,
        resample: str | int = "step",
        base_every: int | None = 1,
        noise_sharing: str = "flipout",
        perturb: str = "policy",
        init: str = "keep",
        **kwargs: Any,
    ) -> None:
        settings = NoiseSettings(family, sigma_init, learn_sigma, resample, base_every, noise_sharing, perturb, init)
        _check_replayable(settings)
        refuse_misplaced(kwargs)
        check_extractor(observation_space, type(self), kwargs)
        super().__init__(observation_space, action_space, lr_schedule, *args, **kwargs)
        self._init_noise(settings)
        self._perturb(self._modules_to_perturb(perturb))
        self.network = NoisyNetwork.of(self)
        self._rollouts = 0
        # Made once more, over sigma too. The first one has no state yet, so nothing is lost.
        self.optimizer = self._make_optimizer(self.parameters(), lr_schedule)

    def _modules_to_perturb(self, perturb: str) -> list[nn.Module]:
        if perturb == "all":
            return [self]
        if perturb == "heads":
            return [self.action_net]
        # A user's own mlp_extractor need not have a policy_net; then it is perturbed as a whole.
        hidden = getattr(self.mlp_extractor, "policy_net", self.mlp_extractor)
        return [self.pi_features_extractor, hidden, self.action_net]

    def begin_rollout(self) -> None:
        """Tell that a rollout starts: the base is redrawn if it is time, and holds until the update after it is done."""
        every = self.noise_settings.base_every
        if every is not None and self._rollouts % every == 0:
            self.network.redraw(self._base_key(self._rollouts // every))
        self._rollouts += 1
        self._keys.begin_rollout()

    @contextmanager
    def collecting(self, n_envs: int) -> Iterator[None]:
        """
        Mark a rollout: forward passes inside it act in the training environments.

        :param n_envs: Number of environments
        :return: Context manager
        """
        self._collects = True
        try:
            yield
        finally:
            self._collects = False

    @contextmanager
    def updating(self) -> Iterator[None]:
        """
        Mark an update: inside it, every batch has to bring its noise.

        :return: Context manager
        """
        self._updates = True
        try:
            yield
        finally:
            self._updates = False

    def get_extra_state(self) -> dict[str, Any]:
        """
        Give the noise state; torch puts it into ``state_dict``.

        :return: Settings, seed, counters and noise scale, as plain Python values
        """
        return {**super().get_extra_state(), "rollouts": self._rollouts}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """
        Continue from a saved noise state.

        :param state: What :meth:`get_extra_state` gave
        """
        super().set_extra_state(state)
        self._rollouts = state["rollouts"]
        every = self.noise_settings.base_every
        self.network.redraw(self._base_key(0 if every is None else max(self._rollouts - 1, 0) // every))

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """
        Give parameters; during an update only those that learn, since TRPO differentiates by all that it finds here.

        :param args: As of ``torch.nn.Module``
        :param kwargs: As of ``torch.nn.Module``
        :return: Names and parameters
        """
        named = super().named_parameters(*args, **kwargs)
        return (item for item in named if item[1].requires_grad) if self._updates else named

    def forward(self, obs: Any, *args: Any, **kwargs: Any) -> Any:
        """
        Act in the environments: the collection step of a rollout, one row per environment.

        The noise of the rows hangs on the returned log-probabilities as their attribute ``row_noise``. Outside
        ``collect_rollouts`` it comes from the stream of evaluation, so that training does not notice. With
        ``deterministic`` the actions are the most likely ones under the mean weights, and nothing is drawn.

        :param obs: Observations, shape (n_envs, ...)
        :param args: Further arguments of SB3's policy
        :param kwargs: The same by name
        :return: Actions, values, log-probabilities, and what else SB3's policy returns
        """
        with self._acting(obs, self._is_deterministic(args, kwargs), self._collects):
            outputs = super().forward(obs, *args, **kwargs)
            outputs[2].row_noise = self.explicit_noise[0] if self.explicit_noise else None
        return outputs

    def evaluate_actions(self, obs: Any, actions: th.Tensor, *args: Any, **kwargs: Any) -> Any:
        """
        Evaluate actions under the noise that the observations carry: the update.

        :param obs: Observations of N transitions, carrying their noise
        :param actions: Actions of these transitions
        :param args: Further arguments of SB3's policy
        :param kwargs: The same by name
        :return: Values, log-probabilities and entropies
        :raises ValueError: In training mode, if the observations carry no noise
        """
        with self._replaying(obs, needed=self.training):
            return super().evaluate_actions(without_noise(obs), actions, *args, **kwargs)  # type: ignore[misc]

    def get_distribution(self, obs: Any, *args: Any, **kwargs: Any) -> Any:
        """
        Give the action distribution under the noise that the observations carry, else under the mean weights.

        :param obs: Observations
        :param args: Further arguments of SB3's policy
        :param kwargs: The same by name
        :return: Action distribution, and what else SB3's policy returns
        :raises ValueError: During an update, if the observations carry no noise
        """
        with self._replaying(obs, needed=self._updates):
            return super().get_distribution(without_noise(obs), *args, **kwargs)  # type: ignore[misc]

    def predict_values(self, obs: Any, *args: Any, **kwargs: Any) -> Any:
        """
        Give values under the noise that the observations carry, else under the mean weights (bootstrapping).

        :param obs: Observations
        :param args: Further arguments of SB3's policy
        :param kwargs: The same by name
        :return: Values, shape (N, 1)
        :raises ValueError: During an update, if the observations carry no noise
        """
        with self._replaying(obs, needed=self._updates):
            return super().predict_values(without_noise(obs), *args, **kwargs)  # type: ignore[misc]

    def _predict(self, observation: Any, *args: Any, **kwargs: Any) -> Any:
        with self._acting(observation, self._is_deterministic(args, kwargs), collects=False):
            return super()._predict(observation, *args, **kwargs)  # type: ignore[safe-super]

    def _is_deterministic(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        at = self.deterministic_at
        return bool(args[at] if len(args) > at else kwargs.get("deterministic", False))

    def _acting(self, obs: Any, deterministic: bool, collects: bool) -> AbstractContextManager[None]:
        """Activate the noise of a step of collection or prediction; what the user has activated by name goes before it."""
        if self.explicit_noise is not None:
            return nullcontext()
        if collects and not deterministic:
            return self.network.activate(self._collection_noise(n_rows(obs)))
        return self.network.activate(self._prediction_noise(obs, deterministic))

    def _replaying(self, obs: Any, needed: bool) -> AbstractContextManager[None]:
        """Activate the noise that a batch brings with it, unless noise is active already."""
        return nullcontext() if self.explicit_noise is not None else self.network.activate(self._replayed_noise(obs, needed))


def _check_replayable(settings: NoiseSettings) -> None:
    if settings.noise_sharing == "shared" and settings.resample != "rollout":
        raise ValueError(
            f'noise_sharing="shared" with resample={settings.resample!r} could not be replayed: the shared draw is the base '
            'perturbation, which must hold from a rollout to the end of its update. Use resample="rollout", or '
            'noise_sharing="flipout", whose rows differ by their keys.'
        )


class FlipoutActorCriticPolicy(OnPolicyNoise, ActorCriticPolicy):
    """``"FlipoutMlpPolicy"`` of PPO, A2C and TRPO; arguments as in :class:`OnPolicyNoise`."""


class FlipoutActorCriticCnnPolicy(OnPolicyNoise, ActorCriticCnnPolicy):
    """``"FlipoutCnnPolicy"`` of PPO, A2C and TRPO; arguments as in :class:`OnPolicyNoise`."""


class FlipoutMultiInputActorCriticPolicy(OnPolicyNoise, MultiInputActorCriticPolicy):
    """``"FlipoutMultiInputPolicy"`` of PPO, A2C and TRPO; arguments as in :class:`OnPolicyNoise`."""
