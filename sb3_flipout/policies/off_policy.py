"""What policies share that learn from replayed transitions: act under row noise, learn under fresh row noise.

Nothing of the acting noise is replayed: an off-policy update is right under any weights. So there are two streams. Acting:
one key per environment, held as ``resample`` says, under the acting base. Learning: keys and base are pure functions of
(gradient step, role of the network).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, ClassVar

import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_flipout.checks import warn_once, warn_user
from sb3_flipout.layers import Ask, FlipoutLayer, PerturbedNetwork
from sb3_flipout.noise import RowNoise
from sb3_flipout.policies.arguments import arguments_of, settings_from
from sb3_flipout.policies.base import FlipoutPolicyMixin
from sb3_flipout.policies.copies import follow
from sb3_flipout.policies.learning import LearnsUnderNoise
from sb3_flipout.policies.learning_noise import LearningNoise, Role
from sb3_flipout.policies.learning_settings import LearningSettings
from sb3_flipout.policies.observations import check_extractor, n_rows
from sb3_flipout.policies.optimizers import count_steps, sigmas_of


class OffPolicyMixin(FlipoutPolicyMixin):
    """Mixin that gives an off-policy policy its two streams of noise; what kinds of policy add stands in their own files."""

    noise_settings: LearningSettings
    #: Names of the target networks, with the network that each follows by polyak averaging.
    targets: ClassVar[tuple[tuple[str, str], ...]]
    where_layers_belong = (
        "Put them into the features extractor, or into the network that make_q_net (make_quantile_net, make_actor) gives"
    )

    def _init_off_policy(
        self,
        kind: type[LearningSettings],
        noise: dict[str, Any],
        spaces: tuple[Any, Any],
        lr_schedule: Schedule,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Check settings, let SB3 build the stock policy, and give it its noise: what constructors have in common."""
        settings = settings_from(kind, noise | kwargs, arguments_of(type(self)))
        check_extractor(spaces[0], type(self), kwargs)
        super().__init__(*spaces, lr_schedule, *args, **kwargs)
        self._init_noise(settings)
        self.learning = LearningNoise(self._noise_seed, settings)
        self._acting_base_key = self._base_key(0)
        self._aligned: list[tuple[th.Tensor, int]] = []  # base draws and versions of when targets had them last
        self._make_noisy(lr_schedule)

    @abstractmethod
    def _make_noisy(self, lr_schedule: Schedule) -> None:
        """Perturb the networks, and make the optimizers anew where sigma is new."""

    @property
    @abstractmethod
    def step_optimizer(self) -> th.optim.Optimizer:
        """The optimizer whose step ends a gradient step."""

    @abstractmethod
    def _acting_network(self) -> nn.Module:
        """What acts: a part of the policy, or all of it."""

    @abstractmethod
    def _learning_networks(self) -> list[LearnsUnderNoise]:
        """List the networks that learn under noise, and those of the target."""

    def _perturbed_networks(self) -> list[PerturbedNetwork]:
        """List the networks of perturbed layers, each once."""
        return list({id(net.perturbed_network): net.perturbed_network for net in self._learning_networks()}.values())

    # ---- what the algorithm tells -------------------------------------------------------------------------------

    def begin_rollout(self) -> None:
        """Tell that a rollout starts."""
        self._keys.begin_rollout()

    @contextmanager
    def collecting(self, n_envs: int) -> Iterator[None]:
        """
        Mark one collection step: predictions inside it act in the training environments.

        :param n_envs: Number of environments
        :return: Context manager
        """
        step = self._keys.step
        noise = self._collection_noise(n_envs)
        self._move_acting_base(step, noise)
        self.learning.acting = noise
        try:
            with self.guard.collection(self, self.perturbed_network):
                yield
        finally:
            self.learning.acting = None

    @property
    def _acting_noise(self) -> RowNoise | None:
        """What the environments' rows see in the collection step that goes on."""
        return self.learning.acting

    def _move_acting_base(self, step: int, noise: RowNoise) -> None:
        settings = self.noise_settings
        if settings.noise_sharing == "shared":  # the base is the draw, so it changes when the first environment's key does
            self._bind_acting_base(int(noise.keys[0]))
        elif settings.base_every_steps is not None and self.learning.base_moves:
            self._bind_acting_base(self._base_key(step // settings.base_every_steps))

    def _bind_acting_base(self, base_key: int) -> None:
        if base_key != self._acting_base_key:
            self._acting_base_key = base_key
            self.perturbed_network.redraw(base_key)

    def lead_copies(self, held: Iterable[Any]) -> None:
        """
        Let copies of this policy's networks learn under its noise; say once if plain ones learn beside them.

        :param held: What the algorithm holds
        """
        held = list(held)
        plain = follow(self._learning_networks(), held)
        if plain and _learned_by(plain, [self.step_optimizer, *held]):
            warn_once(
                self.marks.warned,
                "plain networks",
                f"the algorithm learns a {type(plain[0]).__name__} beside those of its policy, which has no weight noise: "
                "settings of members, priors and bootstrap have no effect on it. The policy's own make_ methods make plain "
                "networks: take a copy of one that it has, such as copy.deepcopy(model.policy.q_net).",
            )

    @contextmanager
    def updating(self) -> Iterator[None]:
        """
        Mark the gradient steps of an update; inside it, networks that are given no noise draw that of the gradient step.

        Inside a ``perturbed(policy, None)`` block the mean weights learn instead.

        :return: Context manager; the acting base is as before when it is left
        """
        if self.marks.updates:  # SB3's `train`, inside which a user says it once more
            yield
            return
        self._align_members()
        self._leave_sigma_as_it_is()
        acting_bases = self.perturbed_network.bases() if self.learning.base_moves else None
        said = self.perturbed_network.active is not None
        # Hung on here, not once for all: copies of an optimizer, and another one put in its place, have no hooks.
        stop_counting = count_steps(self.step_optimizer, self.learning.count)
        self.learning.begin_update(self.effective_scale, by_mean_weights=said)
        self.marks.updates = True
        try:
            with ExitStack() as stack:
                if not said:
                    for network in self._perturbed_networks():
                        stack.enter_context(network.activate(Ask.EXPLICIT))
                if not self.guard.done:
                    stack.enter_context(self.guard.update(self.perturbed_network))
                yield
            self.learning.end_update()
            if not self.guard.done:
                by_mean = self.learning.noise_of(Role.ONLINE) == "mean"
                self.guard.compare(self, self.perturbed_network, self._acting_network(), by_mean)
        finally:
            stop_counting()
            self.learning.leave_update()
            self.marks.updates = False
            if acting_bases is not None:
                self.perturbed_network.bind(acting_bases)

    def _leave_sigma_as_it_is(self) -> None:
        """Dividing sigma after the first gradient step would make members others than those who have learned."""
        if not self._sigma_in_units:
            self._sigma_in_units = True
            warn_user(
                'sigma_unit="inputs" has no effect: gradient steps are made before the policy has met observations, so sigma '
                "stays in units of 1/sqrt(fan_in). Call policy.meet_observations(observations) first, of shape (n, ...).",
            )

    def _align_members(self) -> None:
        """
        Give target networks the members of those that they follow.

        Base draws are what tells members apart, and SB3 syncs parameters alone: whoever loads weights into one network by
        hand, or redraws it, has changed the members of that one only.
        """
        if self.noise_settings.members is None:
            return
        pairs = [pair for target, followed in self.targets for pair in self._paired_layers(target, followed)]
        draws = _base_draws(pairs)
        if len(draws) == len(self._aligned) and all(
            draw is known and draw._version == version for draw, (known, version) in zip(draws, self._aligned, strict=True)
        ):
            return
        for layer, model in pairs:
            layer.bind(model.bases())
        self._aligned = [(draw, draw._version) for draw in _base_draws(pairs)]

    @th.no_grad()
    def _follow_sigma(self) -> None:
        """Give target networks the sigma of those that they follow."""
        for target, followed in self.targets:
            for layer, model in self._paired_layers(target, followed):
                for (_, own), (_, other) in zip(sigmas_of([layer]), sigmas_of([model]), strict=True):
                    own.copy_(other)

    def _paired_layers(self, target: str, followed: str) -> list[tuple[FlipoutLayer, FlipoutLayer]]:
        """
        Perturbed layers of a target network, each with the one that it follows; modules of other kinds may stand around and
        between those of one of them, as where the user has compiled it.
        """
        mine, its = (
            [module for module in getattr(self, name).modules() if isinstance(module, FlipoutLayer)]
            for name in (target, followed)
        )
        if len(mine) != len(its):
            raise ValueError(
                f"{target} has {len(mine)} perturbed layers and {followed}, which it follows, {len(its)}: layers have been "
                "put into or taken out of one of them. Change both alike."
            )
        return list(zip(mine, its, strict=True))

    def _acts(self, observation: PyTorchObs, deterministic: bool) -> AbstractContextManager[None]:
        """Activate the noise of a prediction, unless somebody has said what the rows see."""
        if self.perturbed_network.active is not None:
            return nullcontext()
        acting, rows = self._acting_noise, n_rows(observation)
        if acting is not None and len(acting) != rows:
            raise ValueError(
                f"{type(self).__name__} was asked for actions of {rows} rows in a step of {len(acting)} environments, so "
                "it cannot be told which noise each row sees. Ask about one row per environment; or say it, by the number of "
                "each row's environment: `with sb3_flipout.perturbed(policy, policy.learning.acting[numbers]):`."
            )
        return self.perturbed_network.activate(acting or self._prediction_noise(observation, deterministic))

    # ---- save and load ------------------------------------------------------------------------------------------

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.learning.of_policy = True  # a copy of a whole policy is one of its own

    def _set_noise_seed(self, seed: int) -> None:
        super()._set_noise_seed(seed)
        self.learning.seed = seed

    def noise_state(self) -> dict[str, Any]:
        """
        Take what a resumed training has to know, as plain values.

        :return: As of every policy, and the number of gradient steps and the acting base
        """
        return {**super().noise_state(), "gradient_steps": self.learning.step, "acting_base": self._acting_base_key}

    def set_noise_state(self, state: Mapping[str, Any]) -> None:
        """
        Continue from a saved noise state.

        :param state: What :meth:`noise_state` gave
        :raises NoiseStateError: If the weights saved with it mean something else under the settings of this policy
        """
        gradient_steps = int(state["gradient_steps"])
        super().set_noise_state(state)
        self.learning.step = gradient_steps
        self._acting_base_key = int(state.get("acting_base", self._base_key(0)))
        if self.noise_settings.members is None:  # members' base is a weight, and loaded with the weights
            for network in self._perturbed_networks():
                network.redraw(self._acting_base_key)


def _learned_by(networks: Iterable[nn.Module], things: Iterable[Any]) -> bool:
    """Whether optimizers among things move parameters of networks."""
    optimizers = [one for one in things if isinstance(one, th.optim.Optimizer)]
    moved = {id(p) for one in optimizers for group in one.param_groups for p in group["params"]}
    return any(id(p) in moved for network in networks for p in network.parameters())


def _base_draws(pairs: Sequence[tuple[FlipoutLayer, FlipoutLayer]]) -> list[th.Tensor]:
    return [draw for pair in pairs for layer in pair for draw in layer.bases()[1].values()]
