"""Policies for PPO and A2C (TRPO, MaskablePPO and RecurrentPPO stand on them): explore under row noise, and replay it exactly.

One transition's noise: :meth:`OnPolicyMixin.forward` draws keys, acts under them and hangs them on the log-probabilities;
the rollout buffer stores them and hands them back on the observations; :meth:`OnPolicyMixin.evaluate_actions` activates
them again. Values are replayed with the same keys; bootstrap values, asked for without keys, use mean weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, ClassVar, Literal

import torch as th
from gymnasium import spaces
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.type_aliases import Schedule
from torch import nn

from sb3_flipout.layers import Ask, attach
from sb3_flipout.layers.config import Init
from sb3_flipout.layers.convert import Layers
from sb3_flipout.layers.network import flipout_layers
from sb3_flipout.noise.carried import without_noise
from sb3_flipout.noise.families import FamilyName, NoiseSharing
from sb3_flipout.noise.rows import RowNoise
from sb3_flipout.noise.schedule import Schedule as NoiseSchedule
from sb3_flipout.noise.stream import Resample
from sb3_flipout.policies.base import FlipoutPolicyMixin, check_extractor, n_rows
from sb3_flipout.policies.settings import OnPolicySettings, Perturb, settings_from


class OnPolicyMixin(FlipoutPolicyMixin):
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
    :param base_every_rollouts: How often the base perturbation is redrawn, in rollouts; ``None`` for never; by default at the
        start of each rollout
    :param noise_sharing: ``"flipout"``, ``"shared"`` (with ``resample="rollout"``) or ``"independent"``
    :param perturb: Which part of the network: ``"policy"`` (all that the action depends on), ``"heads"`` or ``"all"``
    :param layers: Which kinds of layer in it: ``"all"``, ``"linear"`` or ``"hidden"`` (of LSTMs and GRUs the hidden-to-hidden
        weights alone)
    :param skip: Names of modules to leave out, as in ``policy.named_modules()``; ``*`` stands for anything
    :param perturb_frozen: Whether layers are perturbed whose weights do not learn
    :param init: ``"keep"`` SB3's initialisation, or ``"noisynet"``
    :param schedule: How the noise falls over training: ``"constant"``, ``"linear"``, ``"cosine"`` or ``"exponential"``
    :param schedule_end: What is left of the noise at the end of the schedule, as a share of the noise scale; default 0
    :param schedule_fraction: Share of training over which it falls; default 0.5
    :param kwargs: Further keyword arguments of SB3's policy
    :raises TypeError: If an argument is unknown, or a value has a wrong type
    :raises ValueError: If a noise setting is unknown, out of range or unfit
    """

    pi_features_extractor: Any  # these three are made by SB3's policy classes
    mlp_extractor: Any
    action_net: Any
    noise_settings: OnPolicySettings
    #: Where ``deterministic`` stands among the arguments of ``forward`` and ``_predict`` after the observations.
    deterministic_at: ClassVar[int] = 0

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        *args: Any,
        family: FamilyName = "gaussian",
        sigma_init: float | None = None,
        learn_sigma: bool = True,
        resample: Resample | int = "step",
        base_every_rollouts: int | None | Literal["default"] = "default",
        noise_sharing: NoiseSharing = "flipout",
        perturb: Perturb = "policy",
        layers: Layers = "all",
        skip: str | Sequence[str] = (),
        perturb_frozen: bool = False,
        init: Init = "keep",
        schedule: NoiseSchedule = "constant",
        schedule_end: float | None = None,
        schedule_fraction: float | None = None,
        **kwargs: Any,
    ) -> None:
        noise = dict(family=family, sigma_init=sigma_init, learn_sigma=learn_sigma, resample=resample)
        noise |= dict(base_every_rollouts=base_every_rollouts, noise_sharing=noise_sharing, perturb=perturb, layers=layers)
        noise |= dict(skip=skip, perturb_frozen=perturb_frozen, init=init)
        noise |= dict(schedule=schedule, schedule_end=schedule_end, schedule_fraction=schedule_fraction)
        settings = settings_from(OnPolicySettings, noise | kwargs, _KNOWN)
        check_extractor(observation_space, type(self), kwargs)
        super().__init__(observation_space, action_space, lr_schedule, *args, **kwargs)
        self._init_noise(settings)
        self._perturb(self._modules_to_perturb(settings.perturb))
        self.perturbed_network = attach(flipout_layers([self]), of_policy=True)
        self._find_layouts(self.perturbed_network, lambda obs: self.outputs_of(self, obs))
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

    # ---- what the algorithm tells -------------------------------------------------------------------------------

    def begin_rollout(self) -> None:
        """Tell that a rollout starts: the base is redrawn if it is time, and holds until the update after it is done."""
        every = self.noise_settings.base_every_rollouts
        if every is not None and self._rollouts % every == 0:
            self.perturbed_network.redraw(self._base_key(self._rollouts // every))
        self._rollouts += 1
        self._keys.begin_rollout()

    @contextmanager
    def collecting(self, n_envs: int) -> Iterator[None]:
        """
        Mark a rollout: in it the algorithm's own steps act in the training environments.

        :param n_envs: Number of environments
        :return: Context manager
        """
        self.marks.collects = self.marks.step_due = True
        try:
            with self.guard.collection(self, self.perturbed_network):
                yield
        finally:
            self.marks.collects = False

    @contextmanager
    def updating(self) -> Iterator[None]:
        """
        Mark an update: in it, every batch has to bring its noise.

        :return: Context manager
        """
        self.marks.updates = True
        try:
            with nullcontext() if self._said() else self.perturbed_network.activate(Ask.EXPLICIT):
                yield
            self.guard.check_silent()
        finally:
            self.marks.updates = False

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """
        List parameters; during an update only those that learn, since TRPO differentiates by all that it finds here.

        :param args: As of ``torch.nn.Module``
        :param kwargs: As of ``torch.nn.Module``
        :return: Names and parameters
        """
        named = super().named_parameters(*args, **kwargs)
        return (item for item in named if item[1].requires_grad) if self._in_update() else named

    def _in_update(self) -> bool:
        marks = self.__dict__.get("marks")  # SB3 asks for parameters before there are any
        return marks is not None and marks.updates

    # ---- forward passes -----------------------------------------------------------------------------------------

    def forward(self, obs: Any, *args: Any, **kwargs: Any) -> Any:
        """
        Act in the environments: the collection step of a rollout, one row per environment.

        The noise of the rows hangs on the returned log-probabilities as their attribute ``row_noise``. It is that of training
        in the algorithm's own step, once per step; everybody else's comes from the stream of evaluation, so that training does
        not notice. With ``deterministic`` the actions are the most likely ones under the mean weights, and nothing is drawn.

        :param obs: Observations, shape (n_envs, ...)
        :param args: Further arguments of SB3's policy
        :param kwargs: The same by name
        :return: Actions, values, log-probabilities, and what else SB3's policy returns
        """
        with self._acting(obs, self._is_deterministic(args, kwargs), self._takes_step()):
            outputs = super().forward(without_noise(obs), *args, **kwargs)
            self._hang_noise(outputs[2])
        return outputs

    def evaluate_actions(self, obs: Any, actions: th.Tensor, *args: Any, **kwargs: Any) -> Any:
        """
        Evaluate actions under the noise that the observations carry: the update. Outside an update, observations without
        noise are looked at under the mean weights.

        :param obs: Observations of N transitions, carrying their noise
        :param actions: Actions of these transitions
        :param args: Further arguments of SB3's policy
        :param kwargs: The same by name
        :return: Values, log-probabilities and entropies
        :raises ValueError: During an update, if the observations carry no noise
        """
        self._warn_of_unregistered(obs)
        with self._replaying(obs):
            return super().evaluate_actions(without_noise(obs), actions, *args, **kwargs)  # type: ignore[misc]

    def get_distribution(self, obs: Any, *args: Any, **kwargs: Any) -> Any:
        """
        Compute the action distribution under the noise that the observations carry, else under the mean weights.

        :param obs: Observations
        :param args: Further arguments of SB3's policy
        :param kwargs: The same by name
        :return: Action distribution, and what else SB3's policy returns
        :raises ValueError: During an update, if the observations carry no noise
        """
        with self._replaying(obs):
            return super().get_distribution(without_noise(obs), *args, **kwargs)  # type: ignore[misc]

    def predict_values(self, obs: Any, *args: Any, **kwargs: Any) -> Any:
        """
        Compute values under the noise that the observations carry, else under the mean weights (bootstrapping).

        :param obs: Observations
        :param args: Further arguments of SB3's policy
        :param kwargs: The same by name
        :return: Values, shape (N, 1)
        :raises ValueError: During an update, if the observations carry no noise
        """
        with self._replaying(obs):
            return super().predict_values(without_noise(obs), *args, **kwargs)  # type: ignore[misc]

    def extract_features(self, obs: Any, *args: Any, **kwargs: Any) -> Any:
        """
        Extract features under the noise that is active or that the observations carry, else under the mean weights.

        :param obs: Observations
        :param args: Further arguments of SB3's policy
        :param kwargs: The same by name
        :return: Features
        :raises ValueError: During an update, if the observations carry no noise
        """
        with self._replaying(obs):
            return super().extract_features(without_noise(obs), *args, **kwargs)  # type: ignore[misc]

    def _predict(self, observation: Any, *args: Any, **kwargs: Any) -> Any:
        with self._acting(observation, self._is_deterministic(args, kwargs), takes_step=False):
            return super()._predict(without_noise(observation), *args, **kwargs)  # type: ignore[safe-super]

    def _is_deterministic(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        at = self.deterministic_at
        return bool(args[at] if len(args) > at else kwargs.get("deterministic", False))

    def _takes_step(self) -> bool:
        """Whether a forward pass now is the algorithm's own step: the first one after the last step was told to be over."""
        takes = self.marks.collects and self.marks.step_due
        self.marks.step_due = False
        return takes

    def _acting(self, obs: Any, deterministic: bool, takes_step: bool) -> AbstractContextManager[None]:
        """Activate the noise of a step of collection or prediction, unless somebody has said what the rows see."""
        if self._said():
            return nullcontext()
        if takes_step and not deterministic:
            return self.perturbed_network.activate(self._collection_noise(n_rows(obs)))
        return self.perturbed_network.activate(self._prediction_noise(obs, deterministic))

    @contextmanager
    def _replaying(self, obs: Any) -> Iterator[None]:
        """Activate the noise that a batch brings with it, unless somebody has said what the rows see."""
        with ExitStack() as stack:
            if not self._said():
                noise = self._own_noise(obs)
                self._check_brought(obs, noise)
                stack.enter_context(self.perturbed_network.activate(noise))
                if noise is not None and self.marks.updates:
                    stack.enter_context(self.guard.update(self, self.perturbed_network))
            yield

    def _hang_noise(self, log_prob: th.Tensor) -> None:
        """Let the log-probabilities of a step carry the noise that it was made under."""
        active = self.perturbed_network.active
        noise = active if isinstance(active, RowNoise) else None
        log_prob.row_noise = noise  # type: ignore[attr-defined]
        self.marks.acted_unmarked = noise is not None and not self.marks.collects

    def _warn_of_unregistered(self, obs: Any) -> None:
        """Say that an algorithm that nobody has registered loses the noise: it acts under it and learns without."""
        unmarked = self.marks.acted_unmarked
        learns = self.training and th.is_grad_enabled() and not self.marks.updates and not self._said()
        if unmarked and learns and self._own_noise(obs) is None and "unregistered" not in self.marks.warned:
            self.marks.warned.add("unregistered")
            warnings.warn(
                f"{type(self).__name__} has acted under weight noise and is now evaluated for learning without it. If this is an "
                "algorithm of your own, call sb3_flipout.register(YourAlgorithm) before you make the model: its rollouts then "
                "carry their noise to the update. Else call policy.set_training_mode(False) first.",
                stacklevel=3,
            )

    # ---- save, load, compare ------------------------------------------------------------------------------------

    def noise_state(self) -> dict[str, Any]:
        """
        Take what a resumed training has to know, as plain values.

        :return: As of every policy, and the number of rollouts
        """
        return {**super().noise_state(), "rollouts": self._rollouts}

    def set_noise_state(self, state: Mapping[str, Any]) -> None:
        """
        Continue from a saved noise state.

        :param state: What :meth:`noise_state` gave
        :raises NoiseStateError: If the weights saved with it mean something else under the settings of this policy
        """
        super().set_noise_state(state)
        self._rollouts = int(state["rollouts"])
        every = self.noise_settings.base_every_rollouts
        self.perturbed_network.redraw(self._base_key(0 if every is None else max(self._rollouts - 1, 0) // every))

    @staticmethod
    def outputs_of(policy: Any, obs: Any) -> list[th.Tensor]:
        """
        Compute what a policy of this kind says, plain or not.

        :param policy: Policy
        :param obs: Observations, as tensors
        :return: Most likely actions, values, and logarithms of their probabilities
        """
        actions, values, log_prob = policy.forward(obs, deterministic=True)
        return [actions, values, log_prob]


_KNOWN = ("net_arch", "activation_fn", "ortho_init", "use_sde", "log_std_init", "full_std", "use_expln", "squash_output")


class FlipoutActorCriticPolicy(OnPolicyMixin, ActorCriticPolicy):
    """``"FlipoutMlpPolicy"`` of PPO, A2C and TRPO; arguments as in :class:`OnPolicyMixin`."""


class FlipoutActorCriticCnnPolicy(OnPolicyMixin, ActorCriticCnnPolicy):
    """``"FlipoutCnnPolicy"`` of PPO, A2C and TRPO; arguments as in :class:`OnPolicyMixin`."""


class FlipoutMultiInputActorCriticPolicy(OnPolicyMixin, MultiInputActorCriticPolicy):
    """``"FlipoutMultiInputPolicy"`` of PPO, A2C and TRPO; arguments as in :class:`OnPolicyMixin`."""


ACTOR_CRITIC_ALIASES: dict[str, type[FlipoutPolicyMixin]] = {
    "FlipoutMlpPolicy": FlipoutActorCriticPolicy,
    "FlipoutCnnPolicy": FlipoutActorCriticCnnPolicy,
    "FlipoutMultiInputPolicy": FlipoutMultiInputActorCriticPolicy,
}

#: The names of these policies, by algorithm.
ALIASES: dict[type[BaseAlgorithm], dict[str, type[FlipoutPolicyMixin]]] = {
    PPO: ACTOR_CRITIC_ALIASES,
    A2C: ACTOR_CRITIC_ALIASES,
}
