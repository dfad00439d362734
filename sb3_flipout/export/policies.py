"""Export a policy without code, and import one from somebody whose code nobody wants to run."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch as th
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.utils import get_device
from torch.utils._python_dispatch import TorchDispatchMode

from sb3_flipout.evolution import FlipES
from sb3_flipout.export.describe import described, value_of
from sb3_flipout.policies import FlipoutPolicyMixin
from sb3_flipout.policies.arguments import arguments_of
from sb3_flipout.registration import ALIASES

#: What the files are called.
DESCRIPTION, TENSORS = "policy.json", "policy.safetensors"
_FORMAT = 1
_LARGEST = 10_000_000  # bytes of a description
# What makes networks large: no number in them can be larger than the largest tensor's sides.
_SIZES = (
    "net_arch",
    "features_extractor_kwargs",
    "lstm_hidden_size",
    "lstm_kwargs",
    "n_lstm_layers",
    "n_quantiles",
    "n_critics",
)
_UNIT = "prior.unit"  # NaN until it is measured
_TYPES = (th.float32, th.float64, th.float16, th.bfloat16, th.int64, th.int32, th.uint8, th.bool)
_SMALL = 4096  # a size that harms no machine
_MEMBERS = 10_000

#: The policies that a description can name.
POLICIES: dict[str, type[Any]] = {
    kind.__qualname__: kind for aliases in (*ALIASES.values(), FlipES.policy_aliases) for kind in aliases.values()
}


def _safetensors() -> Any:
    try:
        import safetensors.torch as found
    except ImportError as error:
        raise ImportError('exporting policies needs safetensors; pip install "sb3_flipout[export]" does it.') from error
    return found


def export_policy(policy: Any, folder: str | Path) -> Path:
    """
    Write a policy as ``policy.safetensors`` and ``policy.json``: weights, sigma, noise settings and state, spaces. No pickle.

    :param policy: A flipout policy, or a model with one
    :param folder: Folder, made if it is not there; files of an earlier export are replaced
    :return: The folder
    :raises TypeError: If the policy is no flipout policy of this package, or an argument of it cannot be described
    :raises ImportError: If safetensors is not installed
    """
    policy, folder = getattr(policy, "policy", policy), Path(folder)
    if not isinstance(policy, FlipoutPolicyMixin) or POLICIES.get(type(policy).__qualname__) is not type(policy):
        raise TypeError(
            f"a {type(policy).__name__} cannot be described without code: only the flipout policies of this package can. Save "
            "policy.state_dict() as safetensors, and build the policy in your own code."
        )
    known = arguments_of(type(policy)) - {"lr_schedule"}
    arguments = {name: value for name, value in policy._get_constructor_parameters().items() if name in known}
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in policy.state_dict().items()}
    found = dict(
        format=_FORMAT,
        policy=type(policy).__qualname__,
        arguments={name: described(value, name) for name, value in arguments.items()},
        noise=described(policy.noise_state(), "the noise state"),
        tensors={name: dict(shape=list(value.shape), dtype=str(value.dtype)) for name, value in tensors.items()},
        versions={name: version(name) for name in ("sb3_flipout", "stable_baselines3", "torch")},
    )
    folder.mkdir(parents=True, exist_ok=True)
    parts = {name: folder / f".{name}.{os.getpid()}.unfinished" for name in (TENSORS, DESCRIPTION)}
    try:
        _safetensors().save_file(tensors, parts[TENSORS])
        # So that new tensors beside an old description are no policy, if the process is killed between the two.
        told = json.dumps({**found, "sha256": _digest(parts[TENSORS])}, indent=1)
        parts[DESCRIPTION].write_text(told, encoding="utf-8")
        shutil.copymode(parts[DESCRIPTION], parts[TENSORS])  # safetensors lets nobody else read what it writes
        for name, part in parts.items():
            os.replace(part, folder / name)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
    return folder


def import_policy(folder: str | Path, device: th.device | str = "auto") -> BasePolicy:
    """
    Read a policy that :func:`export_policy` wrote. No code of its author is run, whatever is in the files.

    The description is compared with the tensors before anything is built, and with the policy that it describes before
    anything is loaded.

    :param folder: Folder of the two files
    :param device: Device of the policy
    :return: The policy, in evaluation mode
    :raises FileNotFoundError: If a file is missing
    :raises ValueError: If a file is damaged, the description is none of this format or does not fit the tensors, or a number
        is not finite
    :raises ImportError: If safetensors is not installed
    """
    folder = Path(folder)
    try:
        return _imported(folder).to(get_device(device))
    except FileNotFoundError:
        raise
    except (RecursionError, MemoryError, OverflowError, OSError) as error:
        raise ValueError(f"{folder} cannot be imported: {error!r}.") from error


def _imported(folder: Path) -> BasePolicy:
    told = _description(folder / DESCRIPTION)
    tensors = _tensors(folder / TENSORS, told)
    kind = POLICIES[told["policy"]]
    arguments = {name: value_of(value, name) for name, value in told["arguments"].items()}
    unknown = sorted(arguments.keys() - arguments_of(kind))
    if unknown:
        raise ValueError(f"{folder / DESCRIPTION} has arguments that {told['policy']} does not: {', '.join(unknown)[:200]}.")
    _check_sizes(arguments, tensors, folder / DESCRIPTION)
    if not isinstance(arguments.get("members") or 2, int) or (arguments.get("members") or 2) > _MEMBERS:
        raise ValueError(f"{folder / DESCRIPTION} has {arguments['members']} members; {_MEMBERS} are the most that are taken.")
    noise = value_of(told["noise"], "the noise state")
    largest = max(_SMALL, *(value.numel() for value in tensors.values()))
    try:
        with _Budget(2 * largest, 20 * len(tensors) + 200):
            policy: Any = kind(**arguments, lr_schedule=BasePolicy._dummy_schedule)
    except Exception as error:
        raise ValueError(f"{folder / DESCRIPTION} describes a policy that cannot be built: {error}") from error
    _check_fits(policy.state_dict(), tensors, folder)
    policy.load_state_dict(tensors)
    try:
        policy.set_noise_state(noise)
    except Exception as error:
        raise ValueError(f"{folder / DESCRIPTION} has a noise state that does not fit: {error}") from error
    policy.set_training_mode(False)
    imported: BasePolicy = policy
    return imported


def _description(path: Path) -> dict[str, Any]:
    with _opened(path) as file:
        text = file.read(_LARGEST + 1)
    if len(text) > _LARGEST:
        raise ValueError(f"{path} is larger than any description of a policy, {_LARGEST} bytes.")
    try:
        told = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {str(error)[:200]}.") from error
    wanted = dict(policy=str, arguments=dict, noise=dict, tensors=dict)
    if not isinstance(told, dict) or not all(isinstance(told.get(name), kind) for name, kind in wanted.items()):
        raise ValueError(f"{path} is no description of a policy: it must have {', '.join(wanted)}.")
    if told.get("format") != _FORMAT:
        raise ValueError(f"{path} has the format {str(told.get('format'))[:80]}, this version of sb3_flipout reads {_FORMAT}.")
    if told["policy"] not in POLICIES:
        raise ValueError(f"{path} describes a {told['policy'][:80]!r}; there are {', '.join(POLICIES)}.")
    return told


def _opened(path: Path) -> IO[bytes]:
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}.")
    if not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path} is no file.")
    return path.open("rb")


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with _opened(path) as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def _tensors(path: Path, told: Mapping[str, Any]) -> dict[str, th.Tensor]:
    """Read the tensors, once their header agrees with the description."""
    library = _safetensors()
    if _digest(path) != told.get("sha256"):
        raise ValueError(f"{path} is not the file that {DESCRIPTION} was written with.")
    try:
        with library.safe_open(path, framework="pt") as file:
            found = {name: file.get_slice(name).get_shape() for name in file.keys()}
            if found != {name: _told_shape(one) for name, one in told["tensors"].items()}:
                raise ValueError(f"{path} holds other tensors than {DESCRIPTION} says.")
            tensors: dict[str, th.Tensor] = {name: file.get_tensor(name) for name in found}
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {str(error)[:200]}") from error
    for name, value in tensors.items():
        if value.dtype not in _TYPES or not value.numel():
            raise ValueError(f"{path} has {name} as {list(value.shape)} of {value.dtype}, which is no policy's.")
        if str(value.dtype) != told["tensors"][name].get("dtype"):
            raise ValueError(f"{path} has {name} in {value.dtype}, {DESCRIPTION} says {told['tensors'][name].get('dtype')!r}.")
        if name == _UNIT and not bool(th.isnan(value) | (th.isfinite(value) & (value > 0))):
            raise ValueError(
                f"{path} has {float(value)} in {name}, which must be a positive number, or NaN before it is measured."
            )
        if value.is_floating_point() and name != _UNIT and not bool(th.isfinite(value).all()):
            raise ValueError(f"{path} has numbers in {name} that are not finite.")
    return tensors


def _told_shape(told: Any) -> Any:
    return told.get("shape") if isinstance(told, dict) else None


class _Budget(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses, while a policy is built, what is larger than the tensors that it is for, or more."""

    def __init__(self, numbers: int, calls: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numbers, self.calls = numbers, calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("empty", "zeros", "ones", "full", "rand", "randn", "empty_strided"):
            self.calls -= 1
            if math.prod(args[0]) > self.numbers or self.calls < 0:
                raise ValueError(f"a tensor of {list(args[0])} is more than those of the file account for")
        return func(*args, **(kwargs or {}))


def _check_sizes(arguments: Mapping[str, Any], tensors: Mapping[str, th.Tensor], path: Path) -> None:
    """
    Networks that were larger than their tensors are not built: they might not fit into memory. Small numbers are let through,
    since some are of parts that a policy does not have (``cnn_output_dim`` without images).
    """
    largest = max((size for value in tensors.values() for size in value.shape), default=0)
    for name in _SIZES:
        for number in _integers(arguments.get(name)):
            if number > max(largest, _SMALL):
                raise ValueError(f"{path} says {name} has {number}, where no tensor is wider than {largest}.")


def _integers(value: Any) -> Iterator[int]:
    if isinstance(value, int) and not isinstance(value, bool):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _integers(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _integers(part)


def _check_fits(wanted: Mapping[str, th.Tensor], tensors: Mapping[str, th.Tensor], folder: Path) -> None:
    for name in sorted(wanted.keys() | tensors.keys()):
        pair = [one.get(name) for one in (wanted, tensors)]
        kinds = [None if one is None else (tuple(one.shape), one.dtype) for one in pair]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"{folder} describes a policy whose {name} is {_kind(kinds[0])}, and holds {_kind(kinds[1])}: the "
                "description does not fit the tensors."
            )


def _kind(of_tensor: Any) -> str:
    return "not there" if of_tensor is None else f"{list(of_tensor[0])} of {of_tensor[1]}"
