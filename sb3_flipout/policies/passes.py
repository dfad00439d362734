"""The forward passes of policies that learn from rollouts: which noise each sees.

One transition's noise: :meth:`OnPolicyPasses.forward` draws keys, acts under them and hangs them on the log-probabilities;
the rollout buffer stores them and hands them back on the observations; :meth:`OnPolicyPasses.evaluate_actions` activates
them again. Values are replayed with the same keys; bootstrap values, asked for without keys, use mean weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch as th

from sb3_flipout.checks import warn_once
from sb3_flipout.noise.carried import without_noise
from sb3_flipout.noise.compiling import eager, steps_aside
from sb3_flipout.noise.rows import RowNoise
from sb3_flipout.policies.base import FlipoutPolicyMixin
from sb3_flipout.policies.observations import n_rows


class OnPolicyPasses(FlipoutPolicyMixin):
    """
    Mixin that says what the forward passes of an actor-critic policy see. What an algorithm hands over beside the
    observations, such as action masks or hidden states, passes through to the policy class behind it.
    """

    #: Where ``deterministic`` stands among the arguments of ``forward`` and ``_predict`` after the observations.
    deterministic_at: ClassVar[int] = 0

    @steps_aside
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
        # The algorithm's own step is the first pass after the last step was told to be over.
        takes_step, self.marks.step_due = self.marks.collects and self.marks.step_due, False
        with self._acting(obs, args, kwargs, takes_step):
            outputs = super().forward(without_noise(obs), *args, **kwargs)
            self._hang_noise(outputs[2])
        return outputs

    @steps_aside
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

    @steps_aside
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

    @steps_aside
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

    @steps_aside
    def extract_features(self, obs: Any, *args: Any, **kwargs: Any) -> Any:
        """
        Extract features under the noise that is active or that the observations carry, else under the mean weights.

        :param obs: Observations
        :param args: Further arguments of SB3's policy
        :param kwargs: The same by name
        :return: Features
        :raises ValueError: During an update, if the observations carry no noise
        """
        if self.perturbed_network.active is not None:
            return super().extract_features(obs, *args, **kwargs)
        with self._replaying(obs):
            return super().extract_features(without_noise(obs), *args, **kwargs)

    @steps_aside
    def _predict(self, observation: Any, *args: Any, **kwargs: Any) -> Any:
        with self._acting(observation, args, kwargs, takes_step=False):
            return super()._predict(without_noise(observation), *args, **kwargs)  # type: ignore[safe-super]

    @eager
    def _acting(
        self, obs: Any, args: tuple[Any, ...], kwargs: dict[str, Any], takes_step: bool
    ) -> AbstractContextManager[None]:
        """Activate the noise of a step of collection or prediction, unless somebody has said what the rows see."""
        if self.perturbed_network.active is not None:
            return nullcontext()
        at = self.deterministic_at
        deterministic = bool(args[at] if len(args) > at else kwargs.get("deterministic", False))
        if takes_step and not deterministic:
            return self.perturbed_network.activate(self._collection_noise(n_rows(obs)))
        return self.perturbed_network.activate(self._prediction_noise(obs, deterministic))

    def _replaying(self, obs: Any) -> AbstractContextManager[None]:
        """Activate the noise that a batch brings with it, unless somebody has said what the rows see."""
        network = self.perturbed_network
        if network.active is not None:
            return nullcontext()
        noise = self._own_noise(obs)
        if noise is None and self.marks.updates:
            self._refuse_noiseless(obs)
        replay: AbstractContextManager[None] = network.activate(noise)
        base = None if noise is None else self._other_base(noise)
        if base is not None:
            replay = self._under_base(base, replay)
        return replay if noise is None or self.guard.done or not self.marks.updates else self._noted(replay)

    @eager
    def _other_base(self, noise: RowNoise) -> int | None:
        """Key of the base under which rows have acted, where that is not the present one: those of an earlier rollout."""
        if noise.base is None or noise.base == self.perturbed_network.layers[0].base_key:
            return None
        if isinstance(noise.base, int):
            return noise.base
        raise ValueError(
            "a batch has rows of several rollouts, which acted under different base perturbations, so one pass cannot replay "
            "them all. Learn from the rollouts one after the other, each from a buffer of its own; or keep one base for good: "
            "policy_kwargs=dict(base_every_rollouts=None)."
        )

    @contextmanager
    def _under_base(self, base: int, replay: AbstractContextManager[None]) -> Iterator[None]:
        """Replay rows of an earlier rollout under its base, which follows from the key, and come back to the present one."""
        network = self.perturbed_network
        present = network.bases()
        network.redraw(base)
        try:
            with replay:
                yield
        finally:
            network.bind(present)

    @contextmanager
    def _noted(self, replay: AbstractContextManager[None]) -> Iterator[None]:
        with replay, self.guard.update(self.perturbed_network):
            yield

    @eager
    def _hang_noise(self, log_prob: th.Tensor) -> None:
        """Let the log-probabilities of a step carry the noise that it was made under."""
        active = self.perturbed_network.active
        noise = active if isinstance(active, RowNoise) else None
        if noise is not None:
            noise = noise.under_base(self.perturbed_network.layers[0].base_key)
        log_prob.row_noise = noise  # type: ignore[attr-defined]
        self.marks.acted_unmarked = noise is not None and not self.marks.collects

    @eager
    def _warn_of_unregistered(self, obs: Any) -> None:
        """Say that an algorithm that nobody has registered loses the noise: it acts under it and learns without."""
        unmarked = self.marks.acted_unmarked
        learns = self.training and th.is_grad_enabled() and not self.marks.updates and self.perturbed_network.active is None
        if unmarked and learns and self._own_noise(obs) is None:
            warn_once(
                self.marks.warned,
                "unregistered",
                f"{type(self).__name__} has acted under weight noise and is now evaluated for learning without it. "
                "If this is an "
                "algorithm of your own, call sb3_flipout.register(YourAlgorithm) before you make the model: its rollouts then "
                "carry their noise to the update. Else call policy.set_training_mode(False) first.",
            )
