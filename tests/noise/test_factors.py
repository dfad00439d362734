"""Factors: numpy, torch and pure Python give the same; nothing but key, layer, vector and place matters."""

import oracle
import pytest
import torch as th

from sb3_flipout.noise import FactorPlan, signs
from sb3_flipout.noise.signs import LayerVectors, factors, salts

KEYS = th.tensor([0, 1, 2, -1, 2**63 - 1, -(2**63), 987654321])
KINDS = sorted(oracle.CUTS)


@pytest.fixture(params=["numpy", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both code paths on CPU."""
    if request.param == "torch":
        monkeypatch.setattr(th.compiler, "is_compiling", lambda: True)
    return request.param


def slow(keys: th.Tensor, layer: int, vector: int, n: int, kind: str) -> th.Tensor:
    rows = [oracle.factors(key, layer, vector, n, kind) for key in keys.tolist()]
    return th.tensor(rows, dtype=th.float64).view(len(keys), n)


@pytest.mark.parametrize("n", [1, 7, 8, 63, 64, 65, 130, 200])
def test_signs_are_those_of_pure_python(path: str, n: int) -> None:
    for layer, vector in [(0, 0), (0, 1), (5, 0), (12, 3)]:
        found = signs(KEYS, layer, n, vector)
        assert found.dtype == th.float32 and found.shape == (len(KEYS), n)
        assert th.equal(found.double(), slow(KEYS, layer, vector, n, "sign"))


def test_vector_is_the_one_over_inputs_by_default() -> None:
    assert th.equal(signs(KEYS, 3, 20), signs(KEYS, 3, 20, vector=0))
    assert not th.equal(signs(KEYS, 3, 20), signs(KEYS, 3, 20, vector=1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 3, 4, 5, 17, 65])
def test_factors_are_those_of_pure_python(path: str, kind: str, n: int) -> None:
    found = factors(KEYS, salts(2, 1, n, kind), kind, th.float64)
    assert found.shape[1] - n < oracle.CUTS[kind][0]
    th.testing.assert_close(found[:, :n], slow(KEYS, 2, 1, n, kind), rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [th.float64, th.float32, th.float16, th.bfloat16], ids=str)
def test_factors_come_in_the_type_of_the_layers(path: str, kind: str, dtype: th.dtype) -> None:
    found = factors(KEYS, salts(2, 1, 9, kind), kind, dtype)
    assert found.dtype == dtype
    assert th.equal(found, factors(KEYS, salts(2, 1, 9, kind), kind, th.float64).to(dtype))


def test_every_value_of_a_piece_is_looked_up_rightly(path: str) -> None:
    for kind in ("normal", "sqrt_normal"):  # 2^18 pieces hit the ends of the table, where a sign error would show
        keys = th.arange(1 << 14)
        found = factors(keys, salts(0, 0, 16, kind), kind, th.float64)
        picked = th.cat([found.amax(1).topk(3).indices, found.amin(1).topk(3, largest=False).indices])
        th.testing.assert_close(found[picked], slow(keys[picked], 0, 0, 16, kind), rtol=0, atol=1e-14)


def test_a_row_depends_on_its_key_only(path: str) -> None:
    keys = th.arange(50) * 7919 - 100
    whole, order = signs(keys, 4, 70, 1), th.randperm(50, generator=th.Generator().manual_seed(1))
    assert th.equal(signs(keys[order], 4, 70, 1), whole[order])
    assert th.equal(th.cat([signs(part, 4, 70, 1) for part in keys.split(7)]), whole)
    assert th.equal(signs(keys[::3], 4, 70, 1), whole[::3])
    column = th.stack([keys, keys + 1], dim=1)[:, 0]
    assert not column.is_contiguous() and th.equal(signs(column, 4, 70, 1), whole)
    assert th.equal(signs(keys[:1].expand(5), 4, 70, 1), whole[:1].expand(5, -1))
    assert th.equal(signs(column, 4, 10, 1), whole[:, :10])  # one word only


def test_an_empty_batch_has_no_rows(path: str) -> None:
    assert signs(KEYS[:0], 0, 5).shape == (0, 5)


def test_hashing_changes_no_argument_and_no_generator(path: str, untouched_rng: None) -> None:
    keys = KEYS.clone()
    first = signs(keys, 0, 100)
    expected = first.clone()
    first.zero_()  # results must not share memory with a table
    assert th.equal(signs(keys, 0, 100), expected) and th.equal(keys, KEYS)


PLAN = [
    LayerVectors(0, "sign", (70, 3)),
    LayerVectors(4, "sqrt_normal", (5, 6)),
    LayerVectors(1, "sign", ()),
    LayerVectors(2, "sign", (9, 64, 130, 64)),
    LayerVectors(7, "sqrt_normal", (1, 4)),
    LayerVectors(3, "sign", (65, 7), scaled=False),
    LayerVectors(5, "sqrt_normal", (3, 2), scaled=False),
]


@pytest.mark.parametrize("scale", [None, th.tensor([0.0, 1.0, -1.0, 0.5, 2.0, 1e-3, 3.0])], ids=["one", "per_row"])
def test_a_plan_gives_each_layer_its_own_factors(path: str, scale: th.Tensor | None) -> None:
    plan = FactorPlan(PLAN)
    block = plan.expand(KEYS, scale, th.float64)
    assert block.shape == (len(KEYS), plan.width)
    parts, c = block.split(plan.sizes, dim=1), th.ones(len(KEYS), 1) if scale is None else scale[:, None]
    for layer, pieces in zip(PLAN, plan.pieces, strict=True):
        assert len(pieces) == len(layer.sizes)
        for vector, (n, piece) in enumerate(zip(layer.sizes, pieces, strict=True)):
            expected = slow(KEYS, layer.layer, vector, n, layer.kind) * (c.double() if vector % 2 and layer.scaled else 1.0)
            th.testing.assert_close(parts[piece], expected, rtol=0, atol=1e-13)
            if layer.kind == "sign" and vector % 2 == 0:
                assert th.equal(parts[piece].float(), signs(KEYS, layer.layer, n, vector))


def test_a_plan_without_vectors_is_empty(path: str) -> None:
    assert FactorPlan([LayerVectors(0, "sign", ())]).width == 0
    assert FactorPlan([]).width == 0


@pytest.mark.parametrize(
    ("keys", "error", "match"),
    [
        (th.tensor([1.0]), TypeError, r"int64 tensor.*torch\.float32"),
        (th.tensor([1], dtype=th.int32), TypeError, r"torch\.int32"),
        (th.tensor([True]), TypeError, r"torch\.bool"),
        ([1, 2], TypeError, "list"),
        (3, TypeError, "got int"),
        (None, TypeError, "NoneType"),
        (th.tensor([[1]]), ValueError, r"shape \(N,\).*\(1, 1\)"),
        (th.tensor(1), ValueError, r"got shape \(\)"),
    ],
)
def test_what_is_no_batch_of_keys_is_refused(keys: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        signs(keys, 0, 3)


# Importing inductor makes torch warn of its own use of torch.jit.
INDUCTOR = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")]
COMPILED = ["eager", "aot_eager", pytest.param("inductor", marks=INDUCTOR)]


@pytest.mark.parametrize("backend", COMPILED)
def test_compilation_leaves_the_bits_alone(backend: str) -> None:
    th._dynamo.reset()
    compiled = th.compile(signs, backend=backend)
    for keys in (KEYS, KEYS[:3], KEYS.repeat(3)):  # the number of rows becomes a symbol of the compiler's
        assert th.equal(compiled(keys, 3, 130, 1), signs(keys, 3, 130, 1))


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("kind", KINDS)
def test_compilation_leaves_the_factors_alone(backend: str, kind: str) -> None:
    th._dynamo.reset()
    word_salts = salts(1, 0, 33, kind)
    expected = factors(KEYS, word_salts, kind, th.float32)
    assert th.equal(th.compile(factors, backend=backend)(KEYS, word_salts, kind, th.float32), expected)


@pytest.mark.skipif(not th.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_computes_the_same_bits() -> None:
    for n, vector in [(7, 0), (130, 1)]:
        assert th.equal(signs(KEYS.cuda(), 3, n, vector).cpu(), signs(KEYS, 3, n, vector))
    for kind in KINDS:
        word_salts = salts(1, 0, 33, kind)
        found = factors(KEYS.cuda(), word_salts.cuda(), kind, th.float64).cpu()
        assert th.equal(found, factors(KEYS, word_salts, kind, th.float64))
