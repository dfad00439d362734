"""Stop training when a parameter is not finite any more, and go back to the last model that was."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import torch as th
from stable_baselines3.common.save_util import load_from_zip_file, recursive_getattr, recursive_setattr
from torch import nn

from sb3_flipout.callbacks.common import NoiseCallback
from sb3_flipout.checks import check_integer, warn_user
from sb3_flipout.finite import first_non_finite


class StopOnNonFinite(NoiseCallback):
    """
    Stop training when sigma, a weight or another parameter of the policy has turned NaN or infinite, or when a reward or an
    observation is. Without this callback such numbers raise a ``NonFiniteError``.

    It looks after gradient steps: PPO evaluates the broken policy already in the next one, which raises an error. Then the
    rest of the update is skipped, the model is put back to the last good checkpoint, and training ends as SB3 lets callbacks
    end it, after one more step in the environments; so what is saved afterwards is good. A reward or an observation ends
    training before anything learns from it: the model stays as it is, and such a transition is not stored. A replay buffer and
    the statistics of ``VecNormalize`` are in no checkpoint, and stay as they are.

    :param save_path: File of the last good checkpoint, for ``Algorithm.load``; replaced each time, never half-written
    :param every: Gradient steps between two looks, off-policy. On-policy it looks at each one, whatever this says: the next
        would evaluate the broken policy; and at the starts of rollouts
    :param save_every: Timesteps between checkpoints. The first one is made when training starts
    :param verbose: Verbosity level of SB3's callbacks
    :raises TypeError: If a number is no integer
    :raises ValueError: If a number is below 1, or ``save_path`` is a folder
    """

    def __init__(self, save_path: str | os.PathLike[str], every: int = 1, save_every: int = 10_000, verbose: int = 0) -> None:
        super().__init__(verbose)
        path = Path(save_path)
        if path.is_dir():
            raise ValueError(f"save_path must be a file, {save_path} is a folder; give {path / 'last_good.zip'}, say.")
        self.save_path = path if path.suffix else path.with_suffix(".zip")
        self.every, self.save_every = check_integer("every", every, 1), check_integer("save_every", save_every, 1)
        #: Name of the parameter that stopped training, or ``"reward of environment 0"``, say; ``None`` if nothing did.
        self.non_finite: str | None = None
        self._broken = False  # whether it is a parameter
        self._hooks: list[th.utils.hooks.RemovableHandle] = []
        self._good: dict[int, th.Tensor] = {}  # the optimizers' parameters in the last checkpoint, by identity
        self._started: float = 0
        self._saved_at = 0

    # ---- when ---------------------------------------------------------------------------------------------------

    def _on_training_start(self) -> None:
        super()._on_training_start()
        name = first_non_finite(dict(self.policy.named_parameters()))
        if name is not None:
            raise ValueError(
                f"{self.name}: {name} is not finite before training has started, so there is nothing good to go back to. Load "
                "an earlier checkpoint."
            )
        for name, optimizer in self._optimizers():
            if not hasattr(optimizer, "_optimizer_step_post_hooks"):
                raise TypeError(
                    f"{self.name} looks at parameters after each step of {name} by torch's hooks, and "
                    f"{type(optimizer).__name__} has none. Let it derive from torch.optim.Optimizer and call "
                    "super().__init__(params, defaults), or leave the callback out: parameters are looked at without it, too, "
                    "every thousand steps."
                )
        self.non_finite, self._broken, self._started = None, False, self.model.start_time
        self.policy.marks.numbers_guarded = True
        self._save()
        self._unhook()
        for name, optimizer in self._optimizers():
            self._hook(optimizer, dict(_named(name, optimizer, self.policy)))

    def _on_rollout_start(self) -> None:
        if not self.off_policy:
            self._look(dict(self.policy.named_parameters()))
        if self._broken:
            self._go_back()
        elif self.model.num_timesteps - self._saved_at >= self.save_every:
            self._save()

    def _on_step(self) -> bool:
        self._hear()
        return self.non_finite is None

    def _on_training_end(self) -> None:
        self._unhook()
        self._look(dict(self.policy.named_parameters()))
        if self._broken:
            self._go_back()
        self._hear()

    def _hear(self) -> None:
        """Take note of a number that came from the environments, and was kept from the policy."""
        told = self.policy.marks.non_finite
        if told is not None and self.non_finite is None:
            self.non_finite = told.where
            self._report(str(told))

    def _optimizers(self) -> Iterator[tuple[str, th.optim.Optimizer]]:
        for name in self.model._get_torch_save_params()[0]:
            part = recursive_getattr(self.model, name)
            if isinstance(part, th.optim.Optimizer) or hasattr(part, "param_groups"):  # an object round an optimizer
                yield name, part

    def _hook(self, optimizer: th.optim.Optimizer, named: Mapping[str, th.Tensor]) -> None:
        steps = count(1)

        def skip(*_: Any) -> None:
            if self._watching() and self.non_finite is not None:
                optimizer.zero_grad(set_to_none=True)  # what has no gradient is left alone

        def look(*_: Any) -> None:
            every = self.every if self.off_policy else 1
            if self._watching() and next(steps) % every == 0 and self._look(named):
                # Only what this step has changed in place anyway: the rest may be part of a graph of SAC's, to be gone through
                # backwards. All else waits for the end of the update.
                with th.no_grad():
                    for parameter in named.values():
                        parameter.copy_(self._good[id(parameter)])

        self._hooks += [optimizer.register_step_pre_hook(skip), optimizer.register_step_post_hook(look)]

    def _watching(self) -> bool:
        """Whether this is the call of learn() that was hooked: one that ended by an error has left its hooks behind."""
        return self.model.start_time == self._started

    def _unhook(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    # ---- what ---------------------------------------------------------------------------------------------------

    def _look(self, named: Mapping[str, th.Tensor]) -> bool:
        """Look for the first parameter that is not finite, once; give whether this time there is one."""
        name = first_non_finite(named) if self.non_finite is None else None
        if name is None:
            return False
        self.non_finite, self._broken = name, True
        self._report(
            f"{name} is not finite at step {self.model.num_timesteps}: training stops, and the model goes back to its state "
            f"of step {self._saved_at}, which is in {self.save_path}. Try a lower learning rate, or a smaller sigma."
        )
        return True

    def _save(self) -> None:
        self.save_path.parent.mkdir(parents=True, exist_ok=True)
        part = self.save_path.with_name(f"{self.save_path.name}.part")
        self.model.save(part)
        os.replace(part, self.save_path)
        self._saved_at = self.model.num_timesteps
        parameters = (
            parameter for name, optimizer in self._optimizers() for _, parameter in _named(name, optimizer, self.policy)
        )
        self._good = {id(parameter): parameter.detach().clone() for parameter in parameters}

    def _go_back(self) -> None:
        _, parameters, variables = load_from_zip_file(self.save_path, device=self.model.device, load_data=False)
        self.model.set_parameters(parameters, device=self.model.device)
        for name, value in (variables or {}).items():  # SAC's temperature, as SB3's load does it
            recursive_setattr(self.model, f"{name}.data", value.data)

    def _report(self, message: str) -> None:
        self.logger.record("noise/non_finite_at", self.model.num_timesteps)
        self.logger.error(message)
        warn_user(message)


def _named(name: str, optimizer: th.optim.Optimizer, policy: nn.Module) -> Iterator[tuple[str, th.Tensor]]:
    """Name the parameters of an optimizer as the policy does; those that are not its own by their place."""
    names = {id(parameter): known for known, parameter in policy.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for place, parameter in enumerate(parameters):
        yield names.get(id(parameter), f"parameter {place} of {name}"), parameter
