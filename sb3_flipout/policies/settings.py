"""The noise settings of a policy: what the user writes into ``policy_kwargs``."""

from __future__ import annotations

from dataclasses import dataclass, fields

from sb3_flipout.layers import LayerNoise
from sb3_flipout.layers.config import one_of
from sb3_flipout.noise.stream import check_resample

PERTURB_CHOICES = ("policy", "heads", "linear", "all")


@dataclass(frozen=True)
class NoiseSettings:
    """
    The noise settings of a policy, flat and plain so that YAML can say them; checked when made.

    :param family: How weights are perturbed: a name in ``sb3_flipout.noise.FAMILIES``
    :param sigma_init: Initial sigma in the family's unit; ``None`` for the default
    :param learn_sigma: Whether sigma is trained
    :param resample: How long an environment keeps its noise: ``"step"``, ``"episode"``, ``"rollout"``, or a number of steps
    :param base_every: How often the base perturbation is redrawn, in rollouts; ``None`` for never
    :param noise_sharing: ``"flipout"``, ``"shared"`` or ``"independent"``
    :param perturb: Which modules: ``"policy"`` (all that the action depends on), ``"heads"`` (its last layer),
        ``"linear"`` (as ``"policy"``, without convolutions), ``"all"`` (values too)
    :param init: ``"keep"`` SB3's initialisation, or ``"noisynet"``
    :raises ValueError: If a value is unknown, out of range, or does not fit another one
    """

    family: str = "gaussian"
    sigma_init: float | None = None
    learn_sigma: bool = True
    resample: str | int = "step"
    base_every: int | None = 1
    noise_sharing: str = "flipout"
    perturb: str = "policy"
    init: str = "keep"

    def __post_init__(self) -> None:
        self.layer_noise()
        check_resample(self.resample)
        one_of("perturb", self.perturb, PERTURB_CHOICES)
        number = isinstance(self.base_every, int) and not isinstance(self.base_every, bool) and self.base_every >= 1
        if self.base_every is not None and not number:
            raise ValueError(f"base_every must be an integer >= 1, or None for never, got {self.base_every!r}.")

    def layer_noise(self) -> LayerNoise:
        """
        Give the part of the settings that concerns layers.

        :return: How each layer is perturbed
        """
        names = [field.name for field in fields(LayerNoise)]
        return LayerNoise(**{name: getattr(self, name) for name in names})
