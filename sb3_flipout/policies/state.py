"""The noise of a policy as a few numbers: its settings, a seed, counters, and the noise scale.

All noise is a pure function of them. They are no weights: ``state_dict`` has tensors only. The algorithm saves them beside its
own data (:mod:`sb3_flipout.hooks`), so a resumed training continues its noise, and copied weights bring none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch as th
from stable_baselines3.common.policies import BasePolicy

from sb3_flipout.checks import check_integer, check_number, warn_once, warn_user
from sb3_flipout.finite import NonFiniteError
from sb3_flipout.noise import EvaluationStream, KeyStream, NoiseOwner, Stream, fold
from sb3_flipout.noise.ladder import checked_ladder
from sb3_flipout.policies.arguments import arguments_of
from sb3_flipout.policies.legacy import translated_settings, with_bases
from sb3_flipout.policies.settings import NoiseSettings

_LARGEST_SCALE = 1e30  # float32 ends at 3e38


class NoiseStateError(RuntimeError, ValueError):
    """A saved noise state does not fit the policy. A ``RuntimeError`` too, since SB3's ``load`` takes others for its own."""


class RunMarks:
    """What a policy knows of the run that goes on. Copies of it are blank: a copied policy takes part in no run yet."""

    def __init__(self) -> None:
        self.running: set[str] = set()  # hooks that are running, so that each tells once
        self.collects = False  # a rollout is being collected
        self.step_due = False  # the algorithm's next collection step has not been made yet
        self.updates = False  # SB3's `train` is running
        self.differentiates_all = False  # and takes the gradient by every parameter that it finds, as TRPO's does
        self.acted_unmarked = False  # somebody acts under noise whom no algorithm has announced
        self.next_looks = (0, 0)  # steps, and gradient steps, from which the parameters are looked at again
        self.trained_at = 0  # steps that had been made when SB3's `train` ran last
        self.warned: set[str] = set()
        self.begin_learning()

    def begin_learning(self) -> None:
        """Forget what held in the last call of learn()."""
        self.steered = False  # a callback steers the noise scale
        self.goes_on = False  # to the end that the last call of learn(), or the training that was saved, had too
        self.numbers_guarded = False  # a callback ends training where numbers are not finite
        self.non_finite: NonFiniteError | None = None  # what is to be said of it

    def __reduce__(self) -> Any:
        return RunMarks, ()


class NoiseState(BasePolicy):
    """What of a flipout policy is saved, set and reseeded."""

    noise_settings: NoiseSettings
    marks: RunMarks

    def _init_state(self, settings: NoiseSettings) -> None:
        self.noise_settings = settings
        self.noise_owner = NoiseOwner()
        self.marks = RunMarks()
        self._noise_seed = _seed_of_torch()
        members = self.members
        self._keys = KeyStream(fold(self._noise_seed, Stream.COLLECTION), settings.resample, members, self.noise_owner)
        self._evaluation = EvaluationStream(fold(self._noise_seed, Stream.EVALUATION), 0, members, self.noise_owner)
        self._noise_scale = 1.0
        self._schedule_factor = settings.factor_at(0.0)
        self._noise_ladder: tuple[float, ...] | None = None
        self._sigma_in_units = settings.sigma_unit == "weights"  # or the first observations are still to come

    # ---- what the user sets -------------------------------------------------------------------------------------

    @property
    def noise_scale(self) -> float:
        """Noise scale c, the number that multiplies every perturbation; 0 gives mean weights. Saved with the model."""
        return self._noise_scale

    @noise_scale.setter
    def noise_scale(self, scale: float) -> None:
        self._noise_scale = check_number("noise_scale", scale, 0.0, _LARGEST_SCALE, "Use 0.0 to switch the noise off.")

    @property
    def noise_ladder(self) -> tuple[float, ...] | None:
        """What multiplies the noise scale in each training environment; ``None`` for no ladder. Saved with the model."""
        return self._noise_ladder

    @noise_ladder.setter
    def noise_ladder(self, ladder: tuple[float, ...] | None) -> None:
        self._noise_ladder = checked_ladder(ladder)

    @property
    def members(self) -> int | None:
        """Number of members of the implicit ensemble; ``None`` where there is none."""
        members: int | None = getattr(self.noise_settings, "members", None)
        return members

    @property
    def redraws_base(self) -> bool:
        """Whether the base perturbation that acts is redrawn in training."""
        settings: Any = self.noise_settings
        every = [getattr(settings, name, None) for name in ("base_every_rollouts", "base_every_steps")]
        return any(period is not None for period in every)

    @property
    def knows_its_inputs(self) -> bool:
        """Whether sigma is in the units that the setting ``sigma_unit`` asks for, or stays without them."""
        return self._sigma_in_units

    @property
    def effective_scale(self) -> float:
        """What perturbations are multiplied by now: the noise scale, times what the schedule has left of it."""
        return self._noise_scale * self._schedule_factor

    def follow_schedule(self, progress: float) -> None:
        """
        Let the noise fall as the setting ``schedule`` says; the algorithm tells the progress.

        :param progress: Share of training that is done
        """
        if not self.marks.steered:
            self._schedule_factor = self.noise_settings.factor_at(progress)

    def leave_schedule(self) -> None:
        """Let a callback steer the noise scale: until the next call of ``learn`` the setting ``schedule`` has no effect."""
        if not self.marks.steered and self.noise_settings.insists_on_schedule:
            warn_user(
                f"a callback steers the noise scale in this call of learn(), so schedule={self.noise_settings.schedule!r} of "
                'the policy has no effect in it. Leave one of them out: schedule="constant" says that the callback is meant.',
            )
        self.marks.steered, self._schedule_factor = True, 1.0

    def warn_of_merging_members(self, cause: str) -> None:
        """
        Say once that noise falls which is all that makes members differ.

        :param cause: What lets it fall
        """
        if self.members is not None:
            warn_once(
                self.marks.warned,
                "members",
                f"{cause} lets the noise of members={self.members} fall. The noise scale multiplies what makes members "
                "differ, their priors too: as it falls they become one network, and there is nothing left to explore by. "
                "Leave it out; members that agree explore no more by themselves.",
            )

    def reseed_noise(self, seed: int) -> None:
        """
        Explore by other noise from now on; counters go on. The base changes when it is next redrawn. Members stay who they
        are: their base is a weight.

        :param seed: Seed, any integer
        :raises TypeError: If it is no integer
        """
        self._set_noise_seed(fold(0, check_integer("seed", seed)))

    def _set_noise_seed(self, seed: int) -> None:
        self._noise_seed = seed
        self._keys.restart(self._keys.step, fold(seed, Stream.COLLECTION))
        self._evaluation.seed = fold(seed, Stream.EVALUATION)

    # ---- save and load ------------------------------------------------------------------------------------------

    def noise_state(self) -> dict[str, Any]:
        """
        Take what a resumed training has to know, as plain values; the algorithm saves it with the model.

        :return: Settings, seed, counters, noise scale and ladder
        """
        return {
            "settings": asdict(self.noise_settings),
            "seed": self._noise_seed,
            "steps": self._keys.step,
            "evaluations": self._evaluation.calls,
            "noise_scale": self._noise_scale,
            "schedule_factor": self._schedule_factor,
            "noise_ladder": self._noise_ladder,
            "sigma_in_units": self._sigma_in_units,
        }

    def set_noise_state(self, state: Mapping[str, Any]) -> None:
        """
        Continue from a saved noise state.

        :param state: What :meth:`noise_state` gave
        :raises NoiseStateError: If the weights saved with it mean something else under the settings of this policy
        """
        differing = self.noise_settings.unlike(state["settings"])
        if differing:
            raise NoiseStateError(
                f"the saved weights do not fit the noise settings of this policy ({'; '.join(differing)}). "
                "Load it with the saved "
                'settings: Algorithm.load(path, custom_objects={"policy_kwargs": dict(...)}), or leave policy_kwargs out.'
            )
        # All is read before anything is changed: a damaged state changes nothing.
        seed, steps, evaluations = (int(state[name]) for name in ("seed", "steps", "evaluations"))
        steps, evaluations = (
            check_integer(name, value, 0) for name, value in (("steps", steps), ("evaluations", evaluations))
        )
        scale = check_number("noise_scale", state["noise_scale"], 0.0, _LARGEST_SCALE)
        factor = check_number("schedule_factor", state.get("schedule_factor", 1.0), 0.0, _LARGEST_SCALE)
        ladder = state.get("noise_ladder")
        self.noise_ladder = None if ladder is None else tuple(ladder)
        self._noise_scale, self._schedule_factor = scale, factor
        self._sigma_in_units = bool(state.get("sigma_in_units", True))
        self._keys.step, self._evaluation.calls = steps, evaluations
        self._set_noise_seed(seed)
        self.noise_settings = self.noise_settings.as_saved(state["settings"])

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """
        Load weights; noise is none of them.

        :param state_dict: What ``state_dict`` gave, of this policy or of one that 0.1.0 saved
        :param strict: Whether all names must match
        :param assign: Whether to keep the given tensors instead of copying them
        :return: Missing and unexpected keys, as torch gives them
        :raises NoiseStateError: If the weights are those of a policy without noise, and ``strict`` is True
        """
        state_dict = self._from_0_1_0(dict(state_dict))
        own_sigma = [name for name in self.state_dict() if name.endswith("_sigma")]
        if strict and own_sigma and not any(name.endswith("_sigma") for name in state_dict):
            raise NoiseStateError(
                "the weights are those of a policy without noise: they have no sigma. "
                "To take them as mean weights and keep the "
                'sigma that is here: model.set_parameters({"policy": weights}, exact_match=False), or '
                "policy.load_state_dict(weights, strict=False)."
            )
        return super().load_state_dict(state_dict, strict, assign)

    def _from_0_1_0(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Take the noise state out of weights that version 0.1.0 saved, and continue from it."""
        saved = state_dict.pop("_extra_state", None)
        if saved is None:
            return state_dict
        self.set_noise_state({**saved, "settings": translated_settings(saved["settings"])})
        return state_dict if self.members is None else with_bases(self, state_dict, int(saved["seed"]))

    def _get_constructor_parameters(self) -> dict[str, Any]:
        arguments = super()._get_constructor_parameters()
        if "share_features_extractor" in arguments_of(type(self)):  # SB3 leaves it out; without it, copies are other networks
            arguments["share_features_extractor"] = self.share_features_extractor
        return {**arguments, **asdict(self.noise_settings)}

    def _base_key(self, draw: int) -> int:
        """Key of a draw of the base, by its number."""
        return fold(self._noise_seed, Stream.BASE, draw)


def _seed_of_torch() -> int:
    """
    Seed the noise by the state of torch's generator: read, not drawn, so that it stays as stock SB3 leaves it.

    The state counts as well as the seed, so that two models made one after the other explore by different noise.
    """
    state = hashlib.blake2b(th.get_rng_state().numpy().tobytes(), digest_size=8)
    return fold(th.initial_seed(), int.from_bytes(state.digest(), "little"))
