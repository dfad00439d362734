"""What layers refuse, word for word: the argument, what came, what is allowed, and what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch as th
from torch import nn

from sb3_flipout.layers import (
    PERTURBED_CLASSES,
    FlipoutConv2d,
    FlipoutConvTranspose2d,
    FlipoutEmbedding,
    FlipoutLinear,
    FlipoutLSTM,
    FlipoutMultiheadAttention,
    effective_weight,
    kl_divergence,
    perturb,
    perturbed,
)
from sb3_flipout.layers.config import LayerNoise
from sb3_flipout.layers.convert import checked_patterns, warn_of_plain
from sb3_flipout.layers.embedding import OneHotLinear
from sb3_flipout.layers.functional import delta
from sb3_flipout.layers.recurrent import FlipoutGRUCell
from sb3_flipout.layers.row_layout import RowLayout
from sb3_flipout.noise import RowNoise

KEYS = th.arange(3)
ROWS = (
    "The rows of a batch must be the first dimension of what a perturbed layer gets. If the network folds others into it, "
    'leave the module out: perturb(net, skip=["its.name"]), or policy_kwargs=dict(skip=["its.name"]).'
)


def under_noise(layer: nn.Module, x: th.Tensor, *args: Any) -> Callable[[], Any]:
    def call() -> Any:
        with perturbed(layer, KEYS):
            return layer(x, *args)

    return call


def folded(layer: Any) -> Any:
    layer.row_layout = RowLayout(0, "interleaved")
    return layer


def twice(first: dict[str, Any], second: dict[str, Any], made: Callable[[], nn.Module]) -> Callable[[], Any]:
    def call() -> Any:
        net = made()
        perturb(net, **first)
        perturb(net, **second)

    return call


def two_scales() -> Any:
    net = nn.Sequential(perturb(nn.Linear(2, 2)))
    with perturbed(net, RowNoise(KEYS), 0.5):
        pass


CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "rows of a linear layer": (
        under_noise(FlipoutLinear(2, 2), th.zeros(4, 2)),
        ValueError,
        f"FlipoutLinear got an input of shape (4, 2) and keys for 3 rows. {ROWS}",
    ),
    "rows of a convolution": (
        under_noise(FlipoutConv2d(1, 1, 1), th.zeros(1, 2, 2)),
        ValueError,
        f"FlipoutConv2d got an input of shape (1, 2, 2) and keys for 3 rows. {ROWS}",
    ),
    "output_size": (
        under_noise(FlipoutConvTranspose2d(1, 1, 1), th.zeros(3, 1, 2, 2), [2, 2]),
        ValueError,
        "FlipoutConvTranspose2d cannot serve output_size=[2, 2] under noise; set output_padding instead.",
    ),
    "rows of an embedding": (
        under_noise(FlipoutEmbedding(5, 2), th.zeros(4, 2, dtype=th.int64)),
        ValueError,
        "FlipoutEmbedding got indices of shape (4, 2) and keys for 3 rows; the first dimension must be the rows of the batch. "
        "If the network folds others into it, leave the module out with skip=.",
    ),
    "an embedding's single index": (
        under_noise(FlipoutEmbedding(5, 2), th.tensor(0)),
        ValueError,
        "FlipoutEmbedding got indices of shape () and keys for 3 rows; the first dimension must be the rows of the batch. If "
        "the network folds others into it, leave the module out with skip=.",
    ),
    "rows of a cell": (
        under_noise(FlipoutGRUCell(2, 2), th.zeros(4, 2)),
        ValueError,
        "FlipoutGRUCell got an input of shape (4, 2) and keys for 3 rows; it needs one row each. If the network folds others "
        "into the batch, leave the module out with skip=.",
    ),
    "rows of sequences": (
        under_noise(FlipoutLSTM(2, 2), th.zeros(5, 4, 2)),
        ValueError,
        "FlipoutLSTM got 4 sequences of 5 steps and keys for 3 rows; give one key per sequence (4), held over its steps, or "
        "one per sequence and step (20).",
    ),
    "sequences of sequences": (
        under_noise(FlipoutLSTM(2, 2), th.zeros(5, 3, 2, 2)),
        ValueError,
        "input must have 2 or 3 dimensions, got shape (5, 3, 2, 2).",
    ),
    "folded sequences": (
        under_noise(folded(FlipoutLSTM(2, 2)), th.zeros(5, 4, 2)),
        ValueError,
        "FlipoutLSTM got 4 sequences of 5 steps and keys for 3 rows; give one key per sequence (4), held over its steps, or "
        "one per sequence and step (20).",
    ),
    "max_norm": (
        lambda: FlipoutEmbedding(5, 2, max_norm=1.0),
        ValueError,
        "FlipoutEmbedding cannot serve max_norm, which rewrites the weights in each forward pass",
    ),
    "sparse": (
        lambda: FlipoutEmbedding(5, 2, sparse=True),
        ValueError,
        "FlipoutEmbedding cannot serve sparse=True, since sigma has dense gradients",
    ),
    "add_bias_kv": (
        lambda: FlipoutMultiheadAttention(4, 2, add_bias_kv=True),
        ValueError,
        "FlipoutMultiheadAttention cannot serve add_bias_kv=True",
    ),
    "a table": (
        lambda: OneHotLinear.from_pretrained(th.zeros(2, 2)),
        TypeError,
        "OneHotLinear cannot be made from a table alone; make one, and copy weight and bias into it.",
    ),
    "nothing to perturb": (
        lambda: perturb(nn.Sequential(nn.LSTM(2, 2)), layers="linear"),
        ValueError,
        "Sequential has no layer to perturb with layers='linear', which stands for: Linear, OneHotLinear.",
    ),
    "a name": (
        lambda: checked_patterns(["layer"], ["", "layers", "other"]),
        ValueError,
        "skip='layer' fits no module; there are layers, other. Did you mean 'layers'?",
    ),
    "a name of many": (
        lambda: checked_patterns("x", [f"{i}" for i in range(13)]),
        ValueError,
        "skip='x' fits no module; there are 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ....",
    ),
    "a name of twelve": (
        lambda: checked_patterns("x", [f"{i}" for i in range(12)]),
        ValueError,
        "skip='x' fits no module; there are 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11.",
    ),
    "perturbed in another way": (
        twice(dict(sigma_init=0.1), dict(sigma_init=0.2), lambda: nn.Linear(2, 2)),
        ValueError,
        f"a layer is already perturbed with {LayerNoise(sigma_init=0.1)}, not {LayerNoise(sigma_init=0.2)}; "
        "call restore first.",
    ),
    "perturbed elsewhere": (
        twice(dict(layers="all"), dict(layers="hidden"), lambda: nn.LSTM(2, 2)),
        ValueError,
        "a FlipoutLSTM is already perturbed with noise_on='all', not 'hidden'; call restore first.",
    ),
    "sigma of dropconnect": (
        lambda: LayerNoise(family="dropconnect", sigma_init=0.1),
        ValueError,
        "sigma_init=0.1 does not fit family='dropconnect': each weight a row sees is 0 or twice its mean, there is no sigma. "
        "Leave sigma_init out and set the noise scale instead.",
    ),
    "noisynet of another family": (
        lambda: LayerNoise(family="isotropic", init="noisynet"),
        ValueError,
        'init="noisynet" is defined for "gaussian" and "factorised" noise, got family=\'isotropic\'.',
    ),
    "sigma of noisynet": (
        lambda: LayerNoise(init="noisynet", sigma_init=0.1),
        ValueError,
        'sigma_init=0.1 does not fit init="noisynet" with family="gaussian", whose sigma is 0.017 by definition. Leave one of '
        "the two out.",
    ),
    "no perturbed layer": (
        lambda: perturbed(nn.Linear(2, 2), KEYS),
        ValueError,
        "Linear has no perturbed layer; call sb3_flipout.perturb(module) first.",
    ),
    "two scales": (
        two_scales,
        ValueError,
        "scale must be None where keys is row noise, which has its own; give RowNoise(keys, scale).",
    ),
    "keys elsewhere": (
        lambda: perturbed(FlipoutLinear(2, 2), KEYS.to("meta")),
        ValueError,
        "keys must be on the network's device cpu, got meta; use keys.to('cpu').",
    ),
    "no layer": (
        lambda: effective_weight(nn.Linear(2, 2), 1),  # type: ignore[arg-type]
        TypeError,
        "layer must be a perturbed layer, got Linear; call sb3_flipout.perturb(layer) first.",
    ),
    "no weight of that name": (
        lambda: effective_weight(FlipoutLSTM(2, 2), 1, name="weight"),
        ValueError,
        "name must be a weight of the FlipoutLSTM: weight_hh_l0, weight_ih_l0; got 'weight'.",
    ),
    "a weight without its name": (
        lambda: effective_weight(FlipoutLSTM(2, 2), 1),
        ValueError,
        "name must be a weight of the FlipoutLSTM: weight_hh_l0, weight_ih_l0; got None.",
    ),
    "divergence of plain layers": (
        lambda: kl_divergence(nn.Linear(2, 2), 1.0),
        ValueError,
        "module has no perturbed layers; call sb3_flipout.perturb(module) first.",
    ),
    "divergence at sigma 0": (
        lambda: kl_divergence(FlipoutLinear(2, 2, sigma_init=0.0), 1.0),
        ValueError,
        "a sigma is 0 or not finite, so the divergence is not; give sigma_init above 0.",
    ),
    "a perturbation of nothing": (
        lambda: delta(th.zeros(2, 2), None, None, False),
        ValueError,
        "a perturbation needs sigma or a base draw, got neither",
    ),
    "divergence of another family": (
        lambda: kl_divergence(FlipoutLinear(2, 2, family="lowrank"), 1.0),
        ValueError,
        "the weights of FlipoutLinear(in_features=2, out_features=2, bias=True, family='lowrank', noise_sharing='flipout') "
        "are not normal; their family must be one of gaussian, multiplicative, isotropic.",
    ),
    "frozen or not": (
        lambda: perturb(nn.Linear(2, 2), perturb_frozen=1),  # type: ignore[arg-type]
        TypeError,
        "perturb_frozen must be True or False, got 1 of type int; pass perturb_frozen=True or =False.",
    ),
    "a frozen layer alone": (
        lambda: perturb(nn.Linear(2, 2).requires_grad_(False)),
        ValueError,
        "Linear has no layer to perturb with layers='all', which stands for: "
        f"{', '.join(kind.__name__ for kind in PERTURBED_CLASSES)}. It: Linear is frozen; perturb_frozen=True perturbs it.",
    ),
    "both directions": (
        lambda: FlipoutLSTM(2, 2, bidirectional=True),
        ValueError,
        "FlipoutLSTM cannot serve bidirectional=True; use bidirectional=False and proj_size=0.",
    ),
}


@pytest.mark.parametrize(("call", "error", "words"), CASES.values(), ids=CASES)
def test_words(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error) as told:
        call()
    assert str(told.value) == words


def test_layers_that_stay_plain() -> None:
    words = (
        "some layers stay plain, so nothing explores through their weights: a: why. It: why too. To say that this is as it "
        "should be, name them: skip=['', 'a']."
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(words)}$") as caught:
        warn_of_plain({"a": "why", "": "why too"})
    assert caught[0].filename == __file__
    warn_of_plain({})
