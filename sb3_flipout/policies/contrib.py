"""Policies for sb3-contrib's algorithms, which stand on those for SB3's. Needs sb3-contrib.

==============  ===================================================================================================
TRPO            the policies of PPO themselves
MaskablePPO     PPO's seam under other policy classes; masks are applied behind the perturbed layers, so a masked
                action has probability zero whatever the noise
RecurrentPPO    PPO's seam around an LSTM
QRDQN           DQN's seam under other names
TQC, CrossQ     SAC's seam with other networks
ARS             none, and a name that says why
==============  ===================================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from sb3_contrib import ARS, QRDQN, TQC, TRPO, CrossQ, MaskablePPO, RecurrentPPO
from sb3_contrib.common.maskable.policies import (
    MaskableActorCriticCnnPolicy,
    MaskableActorCriticPolicy,
    MaskableMultiInputActorCriticPolicy,
)
from sb3_contrib.common.recurrent.policies import (
    RecurrentActorCriticCnnPolicy,
    RecurrentActorCriticPolicy,
    RecurrentMultiInputActorCriticPolicy,
)
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from sb3_contrib.crossq.policies import CrossQPolicy
from sb3_contrib.qrdqn import policies as qrdqn
from sb3_contrib.tqc import policies as tqc
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.type_aliases import Schedule
from torch import nn

from sb3_flipout.layers import FlipoutLSTM
from sb3_flipout.policies.base import FlipoutPolicyMixin
from sb3_flipout.policies.dqn import ValueMixin
from sb3_flipout.policies.learning import LearningJoinedCritic
from sb3_flipout.policies.observations import n_rows
from sb3_flipout.policies.on_policy import ACTOR_CRITIC_ALIASES, OnPolicyMixin
from sb3_flipout.policies.sac_td3 import ActorMixin

# ---- MaskablePPO ----------------------------------------------------------------------------------------------------


class FlipoutMaskableActorCriticPolicy(OnPolicyMixin, MaskableActorCriticPolicy):
    """``"FlipoutMlpPolicy"`` of MaskablePPO; arguments as in :class:`~sb3_flipout.policies.on_policy.OnPolicyMixin`."""


class FlipoutMaskableActorCriticCnnPolicy(OnPolicyMixin, MaskableActorCriticCnnPolicy):
    """``"FlipoutCnnPolicy"`` of MaskablePPO; arguments as in :class:`~sb3_flipout.policies.on_policy.OnPolicyMixin`."""


class FlipoutMaskableMultiInputActorCriticPolicy(OnPolicyMixin, MaskableMultiInputActorCriticPolicy):
    """``"FlipoutMultiInputPolicy"`` of MaskablePPO; arguments as in :class:`~sb3_flipout.policies.on_policy.OnPolicyMixin`."""


# ---- RecurrentPPO ---------------------------------------------------------------------------------------------------


class RecurrentMixin(OnPolicyMixin, RecurrentActorCriticPolicy):
    """
    Mixin that gives a recurrent actor-critic policy its noise; arguments as in
    :class:`~sb3_flipout.policies.on_policy.OnPolicyMixin`.

    A row's noise reaches the LSTM with its row: in collection one step of each environment, in the update padded sequences, in
    which the weights change from step to step as the stored keys do and the hidden state is carried over.
    ``perturb="policy"`` takes the actor's LSTM in, ``layers="linear"`` leaves LSTMs out, ``perturb="all"`` takes the critic's
    in too.
    """

    deterministic_at = 2  # after the states of the LSTM and the starts of episodes

    def _modules_to_perturb(self, perturb: str) -> list[nn.Module]:
        modules = super()._modules_to_perturb(perturb)
        # Between the extractor and the hidden layers, as data flows.
        return modules if perturb in ("all", "heads") else [modules[0], self.lstm_actor, *modules[1:]]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        """Tell the LSTMs too, which sb3-contrib leaves out: else a policy saved alone, or made plain, has others."""
        names = ("shared_lstm", "enable_critic_lstm", "lstm_kwargs")
        sizes = dict(lstm_hidden_size=self.lstm_actor.hidden_size, n_lstm_layers=self.lstm_actor.num_layers)
        return {**super()._get_constructor_parameters(), **sizes, **{name: getattr(self, name) for name in names}}

    @staticmethod
    def _process_sequence(
        features: th.Tensor, lstm_states: tuple[th.Tensor, th.Tensor], episode_starts: th.Tensor, lstm: nn.LSTM
    ) -> Any:  # sb3-contrib annotates the outputs alone
        """
        Run an LSTM over the sequences of a batch, one after the other in its rows, with the noise of each row.

        :param features: Inputs, shape (sequences * steps, features)
        :param lstm_states: Hidden and cell state before the first step, each (layers, sequences, units)
        :param episode_starts: 1 where an episode starts with the row, shape (sequences * steps,)
        :param lstm: The LSTM
        :return: Outputs, shape (sequences * steps, units), and states after the last step
        """
        if not isinstance(lstm, FlipoutLSTM):
            return RecurrentActorCriticPolicy._process_sequence(features, lstm_states, episode_starts, lstm)
        sequences = lstm_states[0].shape[1]
        x, starts = (rows.reshape(sequences, -1, *rows.shape[1:]) for rows in (features, episode_starts))
        outputs, states = lstm.forward_episodes(x, lstm_states, starts, batch_first=True)
        return outputs.flatten(0, 1), states

    @staticmethod
    def outputs_of(policy: Any, obs: Any) -> list[th.Tensor]:
        """
        Compute what a policy of this kind says at the first step of an episode, plain or not.

        :param policy: Policy
        :param obs: Observations, as tensors
        :return: Most likely actions, values, logarithms of their probabilities, and the states of the LSTMs
        """
        n, lstm = n_rows(obs), policy.lstm_actor
        zeros = th.zeros(lstm.num_layers, n, lstm.hidden_size, device=policy.device)
        starts = th.ones(n, device=policy.device)
        states = RNNStates((zeros, zeros), (zeros, zeros))
        actions, values, log_prob, after = policy.forward(obs, states, starts, deterministic=True)
        return [actions, values, log_prob, *after.pi, *after.vf]


class FlipoutRecurrentPolicy(RecurrentMixin, RecurrentActorCriticPolicy):
    """``"FlipoutMlpLstmPolicy"`` of RecurrentPPO; arguments as in :class:`RecurrentMixin`."""


class FlipoutRecurrentCnnPolicy(RecurrentMixin, RecurrentActorCriticCnnPolicy):
    """``"FlipoutCnnLstmPolicy"`` of RecurrentPPO; arguments as in :class:`RecurrentMixin`."""


class FlipoutRecurrentMultiInputPolicy(RecurrentMixin, RecurrentMultiInputActorCriticPolicy):
    """``"FlipoutMultiInputLstmPolicy"`` of RecurrentPPO; arguments as in :class:`RecurrentMixin`."""


# ---- QRDQN ----------------------------------------------------------------------------------------------------------


class FlipoutQRDQNPolicy(ValueMixin, qrdqn.QRDQNPolicy):
    """``"FlipoutMlpPolicy"`` of QRDQN; arguments as in :class:`~sb3_flipout.policies.dqn.ValueMixin`."""

    online_name, targets = "quantile_net", (("quantile_net_target", "quantile_net"),)


class FlipoutQRDQNCnnPolicy(FlipoutQRDQNPolicy, qrdqn.CnnPolicy):
    """``"FlipoutCnnPolicy"`` of QRDQN; arguments as in :class:`~sb3_flipout.policies.dqn.ValueMixin`."""


class FlipoutQRDQNMultiInputPolicy(FlipoutQRDQNPolicy, qrdqn.MultiInputPolicy):
    """``"FlipoutMultiInputPolicy"`` of QRDQN; arguments as in :class:`~sb3_flipout.policies.dqn.ValueMixin`."""


# ---- TQC and CrossQ -------------------------------------------------------------------------------------------------


class FlipoutTQCPolicy(ActorMixin, tqc.TQCPolicy):
    """``"FlipoutMlpPolicy"`` of TQC; arguments as in :class:`~sb3_flipout.policies.sac_td3.ActorMixin`."""

    @staticmethod
    def outputs_of(policy: Any, obs: Any) -> list[th.Tensor]:
        """
        Compute what a policy of this kind says, plain or not.

        :param policy: Policy
        :param obs: Observations, as tensors
        :return: Deterministic actions, and quantiles of their values
        """
        actions = policy.actor._predict(obs, deterministic=True)
        return [actions, policy.critic(obs, actions)]


class FlipoutTQCCnnPolicy(FlipoutTQCPolicy, tqc.CnnPolicy):
    """``"FlipoutCnnPolicy"`` of TQC; arguments as in :class:`~sb3_flipout.policies.sac_td3.ActorMixin`."""


class FlipoutTQCMultiInputPolicy(FlipoutTQCPolicy, tqc.MultiInputPolicy):
    """``"FlipoutMultiInputPolicy"`` of TQC; arguments as in :class:`~sb3_flipout.policies.sac_td3.ActorMixin`."""


class FlipoutCrossQPolicy(ActorMixin, CrossQPolicy):
    """
    ``"FlipoutMlpPolicy"`` of CrossQ.

    Its critic sees present and next transitions in one batch. So with ``perturb="all"`` both are under the online noise, with
    members each row and its next one under the same member; ``target_noise`` is that of the next actions alone.

    :param observation_space: Observation space, of vectors
    :param action_space: Action space, Box
    :param lr_schedule: Learning rate schedule
    :param args: Further arguments of sb3-contrib's policy
    :param kwargs: As in :class:`~sb3_flipout.policies.sac_td3.ActorMixin`
    :raises ValueError: If observations are images or dictionaries, for which CrossQ has no policy
    """

    critic_mixin = LearningJoinedCritic
    targets: ClassVar[tuple[tuple[str, str], ...]] = ()
    last_to_step = "critic"  # the actor's steps are delayed, and its whole loss comes after the critic's

    def __init__(
        self, observation_space: spaces.Space[Any], action_space: Any, lr_schedule: Schedule, *args: Any, **kwargs: Any
    ) -> None:
        own = "features_extractor_class" in kwargs
        if not own and (isinstance(observation_space, spaces.Dict) or is_image_space(observation_space)):
            raise ValueError(
                f"CrossQ has no policy for the observation space {observation_space}: sb3-contrib gives it vectors only. Use "
                'SAC or TQC with "FlipoutCnnPolicy" or "FlipoutMultiInputPolicy", or give a features_extractor_class.'
            )
        super().__init__(observation_space, action_space, lr_schedule, *args, **kwargs)


# ---- ARS ------------------------------------------------------------------------------------------------------------


class NoFlipoutForARS(BasePolicy):
    """
    What ``ARS("FlipoutMlpPolicy", env)`` meets.

    :param args: Not used
    :param kwargs: Not used
    :raises ValueError: Always
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "ARS has no flipout policy: it is parameter noise itself. It perturbs the whole parameter vector, in which sigma "
            'would stand too, and learns from returns alone. Use ARS("MlpPolicy", env); for weight noise with gradients, PPO '
            'or SAC with "FlipoutMlpPolicy"; for an evolution strategy on it, sb3_flipout.FlipES("FlipoutMlpPolicy", env).'
        )

    def _predict(self, observation: Any, deterministic: bool = False) -> Any:
        raise AssertionError("there is no instance of this policy")


#: The names of these policies, by algorithm.
ALIASES: Mapping[type[BaseAlgorithm], dict[str, type[FlipoutPolicyMixin]]] = {
    TRPO: ACTOR_CRITIC_ALIASES,
    MaskablePPO: {
        "FlipoutMlpPolicy": FlipoutMaskableActorCriticPolicy,
        "FlipoutCnnPolicy": FlipoutMaskableActorCriticCnnPolicy,
        "FlipoutMultiInputPolicy": FlipoutMaskableMultiInputActorCriticPolicy,
    },
    RecurrentPPO: {
        "FlipoutMlpLstmPolicy": FlipoutRecurrentPolicy,
        "FlipoutCnnLstmPolicy": FlipoutRecurrentCnnPolicy,
        "FlipoutMultiInputLstmPolicy": FlipoutRecurrentMultiInputPolicy,
    },
    QRDQN: {
        "FlipoutMlpPolicy": FlipoutQRDQNPolicy,
        "FlipoutCnnPolicy": FlipoutQRDQNCnnPolicy,
        "FlipoutMultiInputPolicy": FlipoutQRDQNMultiInputPolicy,
    },
    TQC: {
        "FlipoutMlpPolicy": FlipoutTQCPolicy,
        "FlipoutCnnPolicy": FlipoutTQCCnnPolicy,
        "FlipoutMultiInputPolicy": FlipoutTQCMultiInputPolicy,
    },
    CrossQ: {"FlipoutMlpPolicy": FlipoutCrossQPolicy},
}

#: Names that exist to say why there is no such policy.
REFUSED: Mapping[type[BaseAlgorithm], dict[str, type[BasePolicy]]] = {ARS: {"FlipoutMlpPolicy": NoFlipoutForARS}}
