"""Policies for sb3-contrib's QRDQN: the seam of ``value_based.py`` under another name. Needs sb3-contrib."""

from __future__ import annotations

from sb3_contrib.qrdqn.policies import CnnPolicy, MultiInputPolicy, QRDQNPolicy, QuantileNetwork

from sb3_flipout.policies.learning import NoisyValueNet
from sb3_flipout.policies.value_based import ValueNoise


class FlipoutQuantileNetwork(NoisyValueNet, QuantileNetwork):
    """QRDQN's network."""


class FlipoutQRDQNPolicy(ValueNoise, QRDQNPolicy):
    """``"FlipoutMlpPolicy"`` of QRDQN; arguments as in :class:`ValueNoise`."""

    online_name = "quantile_net"

    def make_quantile_net(self) -> QuantileNetwork:
        """
        Make a network as sb3-contrib does, of the class that knows of learning noise.

        :return: Network
        """
        net = super().make_quantile_net()
        net.__class__ = FlipoutQuantileNetwork
        return net

    def _make_value_net(self) -> NoisyValueNet:
        net = self.make_quantile_net()
        assert isinstance(net, NoisyValueNet), "make_quantile_net has just made it one"
        return net


class FlipoutQRDQNCnnPolicy(FlipoutQRDQNPolicy, CnnPolicy):
    """``"FlipoutCnnPolicy"`` of QRDQN; arguments as in :class:`ValueNoise`."""


class FlipoutQRDQNMultiInputPolicy(FlipoutQRDQNPolicy, MultiInputPolicy):
    """``"FlipoutMultiInputPolicy"`` of QRDQN; arguments as in :class:`ValueNoise`."""
