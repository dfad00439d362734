"""Networks that ask for the noise of the gradient step while SB3 trains.

A network that learns under noise is of a class derived from the user's own (:func:`mixed_in`): its forward pass is
the user's, with the noise of the step around it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch as th
from stable_baselines3.common.policies import BaseModel, BasePolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_flipout.layers import PerturbedNetwork
from sb3_flipout.noise import RowNoise
from sb3_flipout.noise.compiling import uncompiled
from sb3_flipout.policies.extractors import GivesNumbers
from sb3_flipout.policies.learning_noise import LearningNoise, Role
from sb3_flipout.policies.observations import each_once, n_rows, to_take_from
from sb3_flipout.policies.prior import Prior
from sb3_flipout.policies.probing import is_seen_by_us_alone


class LearnsUnderNoise(GivesNumbers):
    """
    Mixin of a network that sees the noise of the gradient step while SB3 trains.

    What somebody has said about the rows stays: the policy when it acts, or a ``perturbed`` block. Where an algorithm of the
    user's own chooses actions by asking the network itself (masked actions, say), a network that acts sees the noise of the
    collection step, if it is asked about as many rows as there are environments.
    """

    acts: bool = False  # whether actions come from it

    role: Role = Role.ONLINE
    is_copy: bool = False  # of a network of the policy, held by the user's algorithm
    learning: LearningNoise | None = None
    #: The network of perturbed layers that it is part of, or is; several networks can share one.
    perturbed_network: PerturbedNetwork
    is_perturbed: bool = True  # False: it shares layers with a perturbed network, and sees their mean weights

    def join_noise(self, network: PerturbedNetwork, learning: LearningNoise, role: Role, is_perturbed: bool = True) -> None:
        """
        Learn under noise from now on.

        :param network: The network of perturbed layers
        :param learning: The noise of gradient steps
        :param role: Online or target network
        :param is_perturbed: Whether it sees the noise, or the mean weights of layers that it shares
        """
        self.perturbed_network, self.learning, self.role, self.is_perturbed = network, learning, role, is_perturbed

    def follow(self, other: LearnsUnderNoise) -> None:
        """
        Learn under the noise of another network of the same kind, of which this one is a copy.

        :param other: Network of the policy that trains
        """
        self.learning, self.is_copy = other.learning, True

    @contextmanager
    def step_noise(self, obs: PyTorchObs, role: Role | None = None) -> Iterator[None]:
        """
        Activate the noise of the present gradient step, or that of the collection step, where nobody has said what rows see.

        :param obs: Observations, of which the rows count
        :param role: Role in this pass; by default that of the network
        :return: Context manager
        """
        learning, network = self.learning, self.perturbed_network
        if learning is None or network.active is not None:
            yield
            return
        if not learning.active:
            acting = self._noise_of_acting(obs, learning)
            with nullcontext() if acting is None else network.activate(acting):
                yield
            return
        role = self._role() if role is None else role
        noise = self._noise_for(obs, learning, role) if self.is_perturbed else None
        if noise is not None and learning.base_moves:
            network.redraw(learning.base_key(role))
        if noise is not None and learning.unseen is not None and self.role == Role.ONLINE and th.is_grad_enabled():
            learning.unseen.ask(self)
        with network.activate(noise):
            yield

    def _role(self) -> Role:
        """A copy that is asked without gradients is a further target, whichever network it was copied from."""
        return Role.TARGET if self.is_copy and not th.is_grad_enabled() else self.role

    def _told_of_learning(self, values: Any) -> Any:
        """Hand the values on; warn once if gradients reach them outside of an update that was announced."""
        learning = self.learning
        if learning is None or self.perturbed_network.is_said:
            return values
        if not (self.training and self.is_perturbed) or learning.noise_of(self.role) == "mean":
            return values
        warn, kind = learning.warn_of_unannounced, type(self).__name__
        for value in values if isinstance(values, tuple) else (values,):
            if isinstance(value, th.Tensor) and value.requires_grad:
                value.register_hook(lambda _: warn(kind))  # type: ignore[no-untyped-call]
        return values

    def _noise_of_acting(self, obs: PyTorchObs, learning: LearningNoise) -> RowNoise | None:
        noise = learning.acting
        acts = noise is not None and self.acts and self.role == Role.ONLINE and n_rows(obs) == len(noise)
        return noise if acts else None

    def _noise_for(self, obs: PyTorchObs, learning: LearningNoise, role: Role) -> RowNoise | None:
        return learning.rows(role, n_rows(obs), self.device, learning.batches.of(obs))


class LearningValueNetwork(LearnsUnderNoise, BasePolicy):
    """Mixin of a value network that learns under noise, and adds its members' prior."""

    acts = True

    # Held as a function's argument would be, so that the prior is no part of this network's parameters: it is neither
    # trained nor copied by polyak.
    prior: tuple[Prior, float] | None = None

    def follow(self, other: LearnsUnderNoise) -> None:
        """
        Learn under the noise of another network of the same kind, of which this one is a copy, and with its prior.

        :param other: Network of the policy that trains
        """
        super().follow(other)
        self.prior = other.prior if isinstance(other, LearningValueNetwork) else None

    def forward(self, obs: PyTorchObs, *args: Any, **kwargs: Any) -> th.Tensor:
        """
        Compute values under the active noise; while SB3 trains, under that of the gradient step.

        :param obs: Observations, shape (N, ...)
        :param args: What the forward of a user's own network takes besides, such as masks; the prior gets it, too
        :param kwargs: The same by name
        :return: Values, shape (N, n_actions), or quantiles, shape (N, n_quantiles, n_actions)
        """
        with self.step_noise(obs):
            noise = self.perturbed_network.active
            if not isinstance(noise, RowNoise):
                plain: th.Tensor = self._told_of_learning(super().forward(obs, *args, **kwargs))
                return plain
            if args or kwargs:  # whose rows nobody knows
                noise.rows_per_input = 1
            learning = self.learning if self.learning is not None and self.learning.active else None
            given = each_once(obs, noise.rows_per_input)
            values: th.Tensor = super().forward(to_take_from(given), *args, **kwargs)
            if self.prior is not None:
                prior, scale = self.prior
                if learning is not None:
                    prior.measure(noise, given, *args, **kwargs)
                values = values + scale * prior(noise, given, *args, **kwargs)
            values = noise.in_order(values)
            if learning is None or self.role != Role.ONLINE or not th.is_grad_enabled():
                return values
            batch = learning.batches.of(obs)
            values = learning.member_data.masked(values, batch, noise.in_order(noise.keys))
            learning.note_learned(batch, n_rows(obs))
            return values

    def _noise_for(self, obs: PyTorchObs, learning: LearningNoise, role: Role) -> RowNoise | None:
        """Where copies of an observation are told apart by their members alone, networks get it once."""
        if role == Role.TARGET:
            learning.note_target(n_rows(obs))
        batch = learning.batches.of(obs)
        times = learning.rows_per_input(obs, batch)
        if times > 1 and times == learning.settings.members and is_seen_by_us_alone(self):
            return learning.rows_by_member(role, n_rows(obs), self.device, batch)
        noise = learning.rows(role, n_rows(obs), self.device, batch)
        if noise is not None:
            noise.rows_per_input = times
        return noise


class LearningCritic(LearnsUnderNoise):
    """Mixin of a critic that learns under noise, or sees the mean weights of layers that it shares with an actor."""

    def forward(self, obs: PyTorchObs, actions: th.Tensor, *args: Any, **kwargs: Any) -> Any:
        """
        Compute the values of actions under the active noise; while SB3 trains, under that of the gradient step.

        :param obs: Observations, shape (N, ...)
        :param actions: Actions, shape (N, n_actions)
        :param args: What the forward of a user's own critic takes besides
        :param kwargs: The same by name
        :return: What the plain critic gives
        """
        with self.step_noise(obs):
            return self._told_of_learning(super().forward(obs, actions, *args, **kwargs))

    def q1_forward(self, obs: PyTorchObs, actions: th.Tensor, *args: Any, **kwargs: Any) -> th.Tensor:
        """
        Compute the values of the first critic alone, as TD3's actor loss asks for them.

        :param obs: Observations, shape (N, ...)
        :param actions: Actions, shape (N, n_actions)
        :param args: What the user's own critic takes besides
        :param kwargs: The same by name
        :return: Values, shape (N, 1)
        """
        with self.step_noise(obs):
            return self._told_of_learning(super().q1_forward(obs, actions, *args, **kwargs))  # type: ignore[misc]


class LearningJoinedCritic(LearningCritic):
    """Mixin of CrossQ's critic, which is asked about observations with the next ones behind them."""

    def _noise_for(self, obs: PyTorchObs, learning: LearningNoise, role: Role) -> RowNoise | None:
        """A row's target, half a batch further on, comes from its own member."""
        batch = learning.batches.joined_in(obs)
        if batch is None:
            return super()._noise_for(obs, learning, role)
        noise = learning.rows(role, batch.rows, self.device, batch)
        return None if noise is None else RowNoise(noise.keys.repeat(2), learning.scale)


class _LearningActor(LearnsUnderNoise, BasePolicy):
    """What actors share: where SB3 asks for actions without gradients, they are part of a target."""

    acts = True

    def _actor_role(self) -> Role:
        return self.role if th.is_grad_enabled() else Role.TARGET


class LearningDeterministicActor(_LearningActor):
    """Mixin of TD3's actor, whose output is the action."""

    def forward(self, obs: PyTorchObs, *args: Any, **kwargs: Any) -> th.Tensor:
        """
        Compute actions under the active noise; while SB3 trains, under that of the gradient step.

        :param obs: Observations, shape (N, ...)
        :param args: What the forward of a user's own actor takes besides
        :param kwargs: The same by name
        :return: Actions, shape (N, n_actions)
        """
        with self.step_noise(obs, self._actor_role()):
            return self._told_of_learning(super().forward(obs, *args, **kwargs))


class LearningStochasticActor(_LearningActor):
    """Mixin of an actor like SAC's: acting and learning both ask for the parameters of its action distribution."""

    def get_action_dist_params(self, obs: PyTorchObs, *args: Any, **kwargs: Any) -> Any:
        """
        Compute the action distribution under the active noise; while SB3 trains, under that of the gradient step.

        :param obs: Observations, shape (N, ...)
        :param args: What a user's own actor takes besides
        :param kwargs: The same by name
        :return: Mean, logarithm of the standard deviation, further arguments of the distribution
        """
        with self.step_noise(obs, self._actor_role()):
            return self._told_of_learning(super().get_action_dist_params(obs, *args, **kwargs))  # type: ignore[misc]


# Classes made at run time, so that networks of one kind have one class.
_DERIVED: dict[tuple[type, type], Any] = {}


def _derived(mixin: type[BaseModel], plain: type[nn.Module]) -> Any:
    if (mixin, plain) in _DERIVED:
        return _DERIVED[mixin, plain]
    members = {"DERIVED_FROM": (mixin, plain), "__module__": __name__, "__doc__": f"{plain.__name__} as {mixin.__name__}."}
    _DERIVED[mixin, plain] = type(f"Flipout{plain.__name__}", (mixin, plain), {**members, "__reduce_ex__": _reduce})
    return _DERIVED[mixin, plain]


def _reduce(net: nn.Module, protocol: Any) -> Any:
    """Pickle by the classes that the class was derived from, since it is made at run time."""
    return _empty, type(net).DERIVED_FROM, net.__getstate__()  # type: ignore[attr-defined, no-untyped-call]


def _empty(mixin: type[BaseModel], plain: type[nn.Module]) -> nn.Module:
    derived = _derived(mixin, plain)
    empty: nn.Module = derived.__new__(derived)
    return empty


def mixed_in(net: nn.Module, mixin: type[BaseModel]) -> Any:
    """
    Give a network a mixin, in place: its class becomes one derived from its own, whose methods it keeps.

    :param net: Network, of SB3's class or of one of the user's, who may have compiled it
    :param mixin: What it shall do besides, such as to learn under noise
    :return: The same network
    """
    inside = uncompiled(net)
    if not isinstance(inside, mixin):
        inside.__class__ = _derived(mixin, type(inside))
    return net
