"""A guard against noise that is lost silently: are the layers called that are perturbed, and by both sides?

A parent can read a layer's weights and never call it, always or in one mode only (a fused kernel in evaluation). Then its rows
do not see the noise they are said to see. So in the first collection and the first update it is noted which layers were called
under noise; those that were not called by both are named in an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from sb3_flipout.checks import warn_user
from sb3_flipout.layers import FlipoutLayer, PerturbedNetwork
from sb3_flipout.noise.compiling import uncompiled

_REMEDY = (
    "Their weights are read by a module that does not call them, so their noise is lost there. Leave them out: "
    "policy_kwargs=dict(skip={names!r}); or call the layers themselves in its forward. (Layers that are left out at "
    "random, as by stochastic depth, are named too: leave all of them out.)"
)


class VisitGuard:
    """Notes which layers the first collection and the first update call under noise."""

    def __init__(self) -> None:
        self.collected: set[int] | None = None
        self.updated: set[int] = set()
        self.done = False
        self.compiled = False  # whether a part of the policy is: what it calls cannot be noted
        self.reached = True  # whether layers were called when the policy was made, as far as is known
        self.warned = False  # whether it has been said that the mean weights act

    def __reduce__(self) -> Any:
        return VisitGuard, ()

    @contextmanager
    def collection(self, policy: nn.Module, network: PerturbedNetwork) -> Iterator[None]:
        """
        Note what is called while a rollout, or a step of one, is collected.

        :param policy: Policy
        :param network: The network of its layers that act
        :return: Context manager
        :raises ValueError: If rows were given noise and no layer took it
        """
        if self.done or self.collected or self.compiled:
            yield
            return
        with network.noting() as visits:
            try:
                yield
            finally:
                self.collected = visits.called or None
        if visits.unsaid and not visits.given_noise and not self.warned:
            self.warned = True
            warn_user(
                "perturbed layers were called to choose actions, and nobody has said which noise their rows see, so the mean "
                f"weights act and nothing explores. Ask {type(policy).__name__} itself, or one of its networks as a whole, "
                "about one row per environment: these know the noise of the step. For mean weights, say so: "
                "`with sb3_flipout.perturbed(policy, None):`."
            )
        if visits.given_noise and not self.collected and not self.reached:
            names = ", ".join(name for name, layer in policy.named_modules() if layer in network.layers)
            raise ValueError(
                f"the policy has acted, and none of its perturbed layers was called, so nothing explores: {names}. Their "
                "weights are not used, or are read by a module that does not call them. Call them in its forward, or choose "
                'others: perturb="policy" takes all, and perturb="heads" the last linear layer that the network has, in the '
                "order in which its modules are registered."
            )

    def check_whole(self, policy: nn.Module, network: PerturbedNetwork) -> None:
        """
        Look, before training, whether all layers that are perturbed are still those that the policy has.

        :param policy: Policy
        :param network: The network of its layers that act
        :raises ValueError: If some have been replaced, or another policy has them
        """
        self.compiled = _is_compiled(policy)
        if not network.is_whole():
            raise ValueError(
                "perturbed layers of the policy have become those of another policy, so nothing explores through them here: "
                "two models hold the same module, an encoder say. Give each one of its own, copy.deepcopy(encoder)."
            )
        inside = {id(module) for module in policy.modules()}
        gone = [layer for layer in network.layers if id(layer) not in inside]
        if gone:
            raise ValueError(
                f"{len(gone)} of {len(network.layers)} perturbed layers are no longer in the policy: "
                f"{', '.join(map(str, gone))}. They have been replaced since it was made, and what stands in their place has "
                "no noise. Make the network as you want it in a policy of your own (its _build, make_q_net or make_actor), so "
                "that it is whole before it is perturbed; or leave out the module that you replace: "
                "policy_kwargs=dict(skip=[...])."
            )

    @staticmethod
    def check_own(networks: Mapping[str, Any], learning: object) -> None:
        """
        Look, before training, whether the networks that learn, and those of the target, are the policy's own.

        :param networks: Networks by name, those that the algorithm holds and those that the policy holds
        :param learning: The noise of the policy's gradient steps
        :raises ValueError: If one of them is a copy, which would see no noise
        """
        foreign = [name for name, net in networks.items() if getattr(net, "learning", learning) is not learning]
        if foreign:
            raise ValueError(
                f"{', '.join(foreign)} is a copy of a perturbed network and would learn without noise: a copy belongs to no "
                "policy. Keep the network that was there, and copy the weights into it: "
                "network.load_state_dict(other.state_dict())."
            )

    @contextmanager
    def update(self, network: PerturbedNetwork) -> Iterator[None]:
        """
        Note what is called in an update, or in a batch of one: algorithms such as TRPO ask for actions and for values apart.

        :param network: The network of the policy's layers that act
        :return: Context manager
        """
        if self.done or self.collected is None or network.visits is not None:
            yield
            return
        with network.noting() as visits:
            try:
                yield
            finally:
                self.updated |= visits.called

    def compare(
        self, policy: nn.Module, network: PerturbedNetwork, acting: nn.Module | None = None, by_mean: bool = False
    ) -> None:
        """
        Compare, after the first update, what it called with what was called in collection.

        :param policy: Policy
        :param network: The network of its layers that act
        :param acting: What of the policy acts, if not all of that network: critics are not called in collection
        :param by_mean: Whether the update learns by mean weights, and so calls no layer under noise
        :raises ValueError: If one called layers that the other did not, or if layers have learned that nobody called
        """
        if self.done or self.collected is None:
            return
        inside = set(map(id, (acting or policy).modules()))
        expected = {slot for slot, layer in enumerate(network.layers) if id(layer) in inside}
        # Where critics share an extractor, its calls may be theirs: that the actor took part is told by its other layers.
        others = [child for child in policy.children() if acting is not None and child is not acting]
        shared = {id(module) for child in others for module in child.modules()}
        own = {slot for slot in expected if id(network.layers[slot]) not in shared} or expected
        updated, self.updated = self.collected if by_mean else self.updated & expected, set()
        if not updated & own:
            return
        self.done = True
        layers, names = network.layers, {id(layer): name for name, layer in policy.named_modules()}
        differing = [names.get(id(layers[slot]), "?") for slot in sorted(self.collected ^ updated)]
        if differing:
            raise ValueError(
                f"the perturbed layers {', '.join(differing)} were called in the first collection or in the first update, and "
                "not in both, so the update would learn under other weights than those that acted. "
                f"{_REMEDY.format(names=differing)}"
            )
        _check_silent({names.get(id(layers[slot]), "?"): layers[slot] for slot in sorted(expected - self.collected)})


def _check_silent(silent: Mapping[str, FlipoutLayer]) -> None:
    """Look whether layers that nobody called have learned: then their weights are read elsewhere."""
    read = [name for name, layer in silent.items() if any(mean.grad is not None for mean in layer.means())]
    if read:
        raise ValueError(f"the perturbed layers {', '.join(read)} learn, and were never called. {_REMEDY.format(names=read)}")
    if silent:
        warn_user(
            f"the perturbed layers {', '.join(silent)} are never called: nothing explores through them. To say that this is "
            f"as it should be, leave them out: policy_kwargs=dict(skip={sorted(silent)!r}).",
        )


def _is_compiled(policy: nn.Module) -> bool:
    """Whether a part of a policy is compiled: what it calls cannot be noted."""
    return any(uncompiled(module) is not module for module in policy.modules())
