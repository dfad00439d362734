"""Policies for sb3-contrib's RecurrentPPO: the seam of ``on_policy.py`` around an LSTM. Needs sb3-contrib.

A row's noise reaches the LSTM with its row: in collection one step of each environment, in the update padded sequences, in
which the weights change from step to step as the stored keys do and the hidden state is carried over.
"""

from __future__ import annotations

from typing import Any

import torch as th
from sb3_contrib.common.recurrent.policies import (
    RecurrentActorCriticCnnPolicy,
    RecurrentActorCriticPolicy,
    RecurrentMultiInputActorCriticPolicy,
)
from torch import nn

from sb3_flipout.layers import FlipoutLSTM
from sb3_flipout.policies.on_policy import OnPolicyNoise


class RecurrentNoise(OnPolicyNoise, RecurrentActorCriticPolicy):
    """
    Mixin that gives a recurrent actor-critic policy its noise; arguments as in :class:`OnPolicyNoise`.

    ``perturb="policy"`` takes the actor's LSTM in, ``"linear"`` leaves LSTMs out, ``"all"`` takes the critic's in too.
    """

    deterministic_at = 2  # after the states of the LSTM and the starts of episodes

    def _modules_to_perturb(self, perturb: str) -> list[nn.Module]:
        modules = super()._modules_to_perturb(perturb)
        # Between the extractor and the hidden layers, as data flows.
        return modules if perturb in ("all", "heads") else [modules[0], self.lstm_actor, *modules[1:]]

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


class FlipoutRecurrentPolicy(RecurrentNoise, RecurrentActorCriticPolicy):
    """``"FlipoutMlpLstmPolicy"`` of RecurrentPPO; arguments as in :class:`RecurrentNoise`."""


class FlipoutRecurrentCnnPolicy(RecurrentNoise, RecurrentActorCriticCnnPolicy):
    """``"FlipoutCnnLstmPolicy"`` of RecurrentPPO; arguments as in :class:`RecurrentNoise`."""


class FlipoutRecurrentMultiInputPolicy(RecurrentNoise, RecurrentMultiInputActorCriticPolicy):
    """``"FlipoutMultiInputLstmPolicy"`` of RecurrentPPO; arguments as in :class:`RecurrentNoise`."""
