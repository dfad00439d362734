"""What all flipout policies share: which layers are perturbed, which noise a forward pass sees, and what they are told."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any, ClassVar

import numpy as np
import torch as th
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import Schedule
from torch import nn

from sb3_flipout.checks import warn_user
from sb3_flipout.layers import FlipoutLayer, PerturbedNetwork
from sb3_flipout.layers.convert import Wanted, checked_patterns, names_to_skip, perturb_named, warn_of_plain
from sb3_flipout.layers.interface import flipout_layers
from sb3_flipout.noise import RowNoise, Scales, noise_of
from sb3_flipout.noise.carried import lost_by
from sb3_flipout.noise.compiling import eager
from sb3_flipout.policies.guard import VisitGuard
from sb3_flipout.policies.left_plain import warn_of_plain_in_actions
from sb3_flipout.policies.observations import looked_at, n_rows
from sb3_flipout.policies.optimizers import is_of_the_user, join_sigma, sigmas_of
from sb3_flipout.policies.plain import plain_copy
from sb3_flipout.policies.probing import give_layouts, nothing_own
from sb3_flipout.policies.settings import NoiseSettings
from sb3_flipout.policies.sigma_units import divide_by_inputs
from sb3_flipout.policies.state import NoiseState


class FlipoutPolicyMixin(NoiseState):
    """Mixin of all flipout policies; stands before SB3's policy class in their bases."""

    #: The network of the layers that act; what rows see is said there and nowhere else.
    perturbed_network: PerturbedNetwork
    #: Which outputs of :meth:`outputs_of` actions are chosen by.
    action_outputs: ClassVar[tuple[int, ...]] = (0,)
    #: Where a user's layers have to be made to be perturbed.
    where_layers_belong: ClassVar[str] = "Put them into the features extractor"

    def _init_noise(self, settings: NoiseSettings) -> None:
        """Set the noise up; called in the constructor, after SB3 has built the stock policy."""
        self.guard = VisitGuard()
        self._known_plain: set[str] = set()  # layers that stay plain, of which that has been said
        self._init_state(settings)
        checked_patterns(settings.skip, names_to_skip(dict(self.named_modules())))

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
        wanted = Wanted(settings.layers, self._left_out(), settings.perturb_frozen)
        left = perturb_named(names, settings.layer_noise(), wanted, lambda: self._base_key(0))
        self._known_plain |= left.keys()
        if not quietly:  # the matrix of gSDE is noise of its own, and no weight that stays plain
            warn_of_plain({name: why for name, why in left.items() if name.split(".")[-1] != "log_std"})

    def _left_out(self) -> tuple[str, ...]:
        """Names of modules to leave out, of all networks that must have the same layers."""
        return tuple(self.noise_settings.skip)

    def _last_linear(self, module: nn.Module) -> nn.Module:
        """The layer that perturb="heads" stands for."""
        found = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
        if not found:
            raise ValueError(
                f'perturb="heads" stands for the last linear layer, and {type(module).__name__} has none. Use '
                'perturb="policy", and leave out by skip what is to stay plain.'
            )
        return found[-1]

    def _find_layouts(self, network: PerturbedNetwork, run: Callable[[Any], Any]) -> None:
        """Find out where the rows of a batch lie in what the layers of a network get."""
        names = {layer: name for name, layer in self.named_modules() if isinstance(layer, FlipoutLayer)}
        self.guard.reached = give_layouts({names[layer]: layer for layer in network.layers if layer in names}, run, self)

    def _make_optimizer(
        self, parameters: Iterable[nn.Parameter], lr_schedule: Schedule, made: th.optim.Optimizer | None = None
    ) -> th.optim.Optimizer:
        """
        Make SB3's optimizer over parameters that include sigma; one that the plain policy has made in its own way is kept.

        Torch's default optimizers walk over the tensors in Python, so the fused implementation is asked for, where it exists
        and the user has not chosen. It rounds differently from the default one in the last bit, so the default one stays where
        gradient steps must equal stock SB3's: with sigma fixed at 0, and with ``update_noise="mean"``.
        """
        parameters, kwargs = list(parameters), dict(self.optimizer_kwargs)
        layers = flipout_layers([self])
        if made is not None:
            sigmas = {id(sigma) for _, sigma in sigmas_of(layers)}
            stock = self.optimizer_class([nn.Parameter(th.zeros(1))], lr=lr_schedule(1), **kwargs)  # type: ignore[call-arg]
            if is_of_the_user(made, stock, [one for one in parameters if id(one) not in sigmas]):
                join_sigma(made, layers)
                return made
        chosen = kwargs | getattr(self.optimizer_class, "keywords", {})  # what a functools.partial has chosen
        settings, kind = self.noise_settings, getattr(self.optimizer_class, "func", self.optimizer_class)
        if (
            (settings.learn_sigma or settings.sigma_init != 0)
            and not settings.learns_by_mean
            and isinstance(kind, type)  # or a function that makes an optimizer
            and issubclass(kind, (th.optim.Adam, th.optim.AdamW))
            and "fused" in signature(self.optimizer_class).parameters
            and not {"fused", "foreach", "differentiable"} & chosen.keys()
        ):
            kwargs["fused"] = True
        return self.optimizer_class(parameters, lr=lr_schedule(1), **kwargs)  # type: ignore[call-arg]

    # ---- which noise a forward pass sees ------------------------------------------------------------------------

    @eager
    def _collection_noise(self, n_envs: int) -> RowNoise:
        """Noise of the next collection step: one row per environment. The only place that advances the training noise."""
        device = self.perturbed_network.layers[0].like.device
        return self._keys.next(n_envs, Scales(self.effective_scale, self._noise_ladder), device)

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

    def _refuse_noiseless(self, obs: Any) -> None:
        """Refuse a batch of an update that brings no noise, and say what became of it."""
        operation, others = lost_by(obs), noise_of(obs)
        if others is not None:
            cause = "its keys were drawn by another policy"
        elif operation is not None:
            cause = f"it had keys and lost them in the operation {operation!r}"
        else:
            cause = "it never had any, or was made of single rows or through several operations that do not hand them on"
        raise ValueError(
            f"a batch reached {type(self).__name__} in an update without its noise keys, "
            f"so its noise cannot be replayed: {cause}. "
            "Batches of the rollout buffer carry them on their observations. "
            "A buffer with a `get` of its own hangs them on by "
            "sb3_flipout.noise.with_noise(observations, self.row_noise(batch_inds)); "
            "an operation that changes rows hands them on "
            "by with_noise(result, noise_of(observations)[rows]). To learn by mean weights, write "
            "`with sb3_flipout.perturbed(policy, None):` around the call."
        )

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

    # ---- comparison with a plain policy ------------------------------------------------------------------------------

    def to_plain_policy(self) -> BasePolicy:
        """
        Make SB3's own policy with the mean weights, for export and for use without this package.

        Of an ensemble (``members``) that is neither the vote nor any member, and the prior is left out.

        :return: Stock policy on the same device; its optimizer is new
        :raises ValueError: If it would not act as the mean weights do: a subclass changes what the stock class computes
        """
        return plain_copy(self, NoiseState)

    def begin_learning(self) -> None:
        """Tell that a call of ``learn`` begins; say once which layers explore nothing."""
        self.marks.begin_learning()
        if self.noise_settings.perturb != "heads" and not nothing_own(self):
            warn_of_plain_in_actions(self, self._known_plain, self.where_layers_belong)

    def meet_observations(self, obs: Any) -> None:
        """
        Tell the first observations of a training; with ``sigma_unit="inputs"`` they are what sigma is measured by, once.

        :param obs: Observations as the algorithm has them, shape (n_envs, ...)
        """
        if self._sigma_in_units or obs is None:
            return
        self._sigma_in_units = True
        tensors, _ = self.obs_to_tensor(obs)
        with looked_at(self):  # SB3 has not asked for evaluation mode yet
            left = divide_by_inputs(self.perturbed_network.layers, lambda: self.mean_outputs(tensors))
        self._follow_sigma()
        if left:
            names = [name for name, layer in self.named_modules() if any(layer is one for one in left)]
            warn_user(
                f'sigma_unit="inputs" has no effect on {", ".join(names)}: their inputs are 0 in the first observations, or '
                "they are neither linear layers nor convolutions. Their sigma is in units of 1/sqrt(fan_in).",
            )

    def _follow_sigma(self) -> None:
        """Give target networks the sigma of those that they follow; on-policy there are none."""

    def lead_copies(self, held: Iterable[Any]) -> None:
        """
        Let copies of this policy's networks learn under its noise; on-policy, whole policies learn, and there are none.

        :param held: What the algorithm holds
        """

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
