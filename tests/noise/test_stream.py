"""Key streams against the naive statement: environment i's key is fold(seed, t, i), t the step at which it last drew."""

from itertools import pairwise
from typing import Any

import numpy as np
import oracle
import pytest
import torch as th

from sb3_flipout.noise import EvaluationStream, FactorPlan, KeyStream, RowNoise, Scales, signs
from sb3_flipout.noise.signs import LayerVectors
from sb3_flipout.noise.stream import RESAMPLE_WORDS, check_resample

SEED = 20_000_000_017
CPU = th.device("cpu")


def following(stream: KeyStream, scale: th.Tensor) -> RowNoise:
    """Noise of the next step, with these scales."""
    return stream.next(len(scale), Scales(1.0, tuple(scale.tolist())), CPU)


RESAMPLE: list[Any] = [*RESAMPLE_WORDS, 1, 3, 50, 1000]


class Naive:
    """Key by key, with nothing remembered but the step at which each environment drew."""

    def __init__(self, seed: int, resample: Any, n_envs: int, step: int = 0) -> None:
        self.seed, self.resample, self.step = seed, resample, step
        self.drawn: list[int | None] = [None] * n_envs

    def begin_rollout(self) -> None:
        if self.resample == "rollout":
            self.drawn = [None] * len(self.drawn)

    def end_episodes(self, dones: np.ndarray) -> None:
        if self.resample == "episode":
            self.drawn = [None if done else drawn for drawn, done in zip(self.drawn, dones, strict=True)]

    def next(self) -> list[int]:
        for env in range(len(self.drawn)):
            if isinstance(self.resample, int):
                self.drawn[env] = self.step // self.resample * self.resample
            elif self.resample == "step" or self.drawn[env] is None:
                self.drawn[env] = self.step
        self.step += 1
        return [oracle.fold(self.seed, drawn, env) for env, drawn in enumerate(self.drawn)]


def play(stream: Any, rng: np.random.Generator, steps: int, n_envs: int, *scale: th.Tensor) -> list[list[int]]:
    """Keys of some steps, with episodes that end at random and rollouts of 37 steps."""
    history = []
    for step in range(steps):
        if step % 37 == 0:
            stream.begin_rollout()
        found = following(stream, *scale) if scale else stream.next()
        history.append(found.keys.tolist() if scale else found)
        stream.end_episodes(rng.random(n_envs) < 0.05)
    return history


@pytest.mark.parametrize("n_envs", [1, 5])
@pytest.mark.parametrize("resample", RESAMPLE)
def test_keys_are_those_of_the_naive_stream(resample: Any, n_envs: int, untouched_rng: None) -> None:
    found = play(KeyStream(SEED, resample), np.random.default_rng(1), 300, n_envs, th.ones(n_envs))
    expected = play(Naive(SEED, resample, n_envs), np.random.default_rng(1), 300, n_envs)
    assert found == expected


def test_the_words_mean_what_they_say() -> None:
    changes = {}
    for resample in RESAMPLE:
        keys = play(KeyStream(SEED, resample), np.random.default_rng(1), 300, 1, th.ones(1))
        changes[resample] = sum(a != b for a, b in pairwise(keys))
    ended = int((np.random.default_rng(1).random(300)[:299] < 0.05).sum())
    assert changes == {"step": 299, "episode": ended, "rollout": 8, 1: 299, 3: 99, 50: 5, 1000: 0}
    assert 1 < ended < 100


@pytest.mark.parametrize("resample", [resample for resample in RESAMPLE if resample != "episode"])
@pytest.mark.parametrize("saved_at", [37, 111, 148])
def test_a_restarted_stream_continues_identically(resample: Any, saved_at: int) -> None:
    """At the start of a rollout, where models are saved and loaded."""
    scale, rng = th.ones(3), np.random.default_rng(1)
    whole = play(KeyStream(SEED, resample), rng, 300, 3, scale)
    stream = KeyStream(1, resample)
    play(stream, rng, 10, 3, scale)  # whatever it did before is forgotten
    stream.restart(saved_at, SEED)
    assert stream.step == saved_at
    assert play(stream, rng, 300 - saved_at, 3, scale) == whole[saved_at:]


def test_a_restarted_stream_draws_anew_for_the_running_episodes() -> None:
    stream = KeyStream(1, "episode")
    following(stream, th.ones(2))
    stream.restart(100, SEED)
    assert play(stream, np.random.default_rng(1), 50, 2, th.ones(2)) == play(
        Naive(SEED, "episode", 2, step=100), np.random.default_rng(1), 50, 2
    )


@pytest.mark.parametrize("resample", RESAMPLE)
def test_an_environments_key_does_not_depend_on_how_many_there_are(resample: Any) -> None:
    few, many = KeyStream(SEED, resample), KeyStream(SEED, resample)
    dones = np.arange(6) == 1
    for _ in range(100):
        a, b = following(few, th.ones(2)).keys, following(many, th.ones(6)).keys
        assert th.equal(a, b[:2])
        assert b.unique().numel() == 6
        few.end_episodes(dones[:2])
        many.end_episodes(dones)


@pytest.mark.parametrize("resample", RESAMPLE)
def test_the_number_of_environments_may_change(resample: Any) -> None:
    stream = KeyStream(SEED, resample)
    for n_envs in (2, 5, 1):
        start, scale = stream.step, th.ones(n_envs)
        for _ in range(7):
            keys = following(stream, scale).keys.tolist()
            drawn = {"step": stream.step - 1}.get(resample, start)
            if isinstance(resample, int):
                drawn = (stream.step - 1) // resample * resample
            assert keys == [oracle.fold(SEED, drawn, env) for env in range(n_envs)]
        stream.end_episodes(np.ones(n_envs + 1, dtype=bool))  # of another vector environment: none of these has ended


@pytest.mark.parametrize("resample", RESAMPLE)
def test_the_scale_is_that_of_each_environment_and_may_change(resample: Any) -> None:
    stream, plan = KeyStream(SEED, resample), FactorPlan([LayerVectors(0, "sign", (3, 4))])
    constant, one = KeyStream(SEED, resample), th.ones(3)
    for scale in (th.tensor([0.5, -2.0, 0.0]), th.tensor([1.0, 3.0, 0.25])):
        for _ in range(70):
            noise = following(stream, scale)
            assert th.equal(noise.scale, scale)
            assert th.equal(noise.factors(plan, th.float32), plan.expand(noise.keys, scale, th.float32))
            assert th.equal(noise.keys, following(constant, one).keys)


def test_factors_are_hashed_once_as_long_as_keys_stay() -> None:
    stream, scale = KeyStream(SEED, "rollout"), th.ones(2)
    first = following(stream, scale)
    assert all(following(stream, scale) is first for _ in range(10))


@pytest.mark.parametrize("resample", ["step", "episode"])
def test_a_scale_that_moves_at_each_step_hashes_nothing_again(resample: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, plan = KeyStream(SEED, resample), FactorPlan([LayerVectors(0, "sign", (3, 4))])
    expanded, expand = [], FactorPlan.expand
    monkeypatch.setattr(FactorPlan, "expand", lambda *args: expanded.append(0) or expand(*args))  # type: ignore[func-returns-value]
    for scale in (1.0, 0.5, 1.0, *np.linspace(1, 0, 30)):
        noise = stream.next(3, Scales(float(scale)), CPU)
        over_outputs = noise.factors(plan, th.float32).split(plan.sizes, dim=1)[plan.pieces[0][1]]
        assert th.equal(over_outputs, float(scale) * signs(noise.keys, 0, 4, 1))
    assert len(expanded) == 1


def test_seeds_and_steps_give_distinct_keys() -> None:
    rng = np.random.default_rng(0)
    steps = [step for seed in range(3) for step in play(KeyStream(seed, "step"), rng, 200, 4, th.ones(4))]
    assert len({key for step in steps for key in step}) == 3 * 200 * 4


def test_evaluation_gives_fresh_keys_that_training_never_reads(untouched_rng: None) -> None:
    evaluation, training = EvaluationStream(SEED), KeyStream(SEED + 1, "step")
    seen, scale = set[int](), th.ones(4)
    for call in range(100):
        noise = evaluation.next(4, 0.5, th.device("cpu"))
        assert noise.keys.tolist() == [oracle.fold(SEED, call, row) for row in range(4)]
        assert noise.scale.tolist() == [0.5] * 4
        seen |= set(noise.keys.tolist())
    assert len(seen) == 400 and evaluation.calls == 100
    assert seen.isdisjoint(key for _ in range(100) for key in following(training, scale).keys.tolist())


@pytest.mark.parametrize("members", [1, 3, 64])
@pytest.mark.parametrize("resample", RESAMPLE)
def test_an_ensemble_has_as_many_keys_as_members(resample: Any, members: int) -> None:
    scale, rng = th.ones(3), np.random.default_rng(1)
    found = play(KeyStream(SEED, resample, members), rng, 300, 3, scale)
    free = play(Naive(SEED, resample, 3), np.random.default_rng(1), 300, 3)
    assert found == [[key % members for key in keys] for keys in free]
    evaluation = EvaluationStream(SEED, 5, members).next(4, 1.0, th.device("cpu"))
    assert evaluation.keys.tolist() == [oracle.fold(SEED, 5, row) % members for row in range(4)]


@pytest.mark.parametrize("resample", [0, -1, True, False, "foo", "", 1.5, None])
def test_a_bad_resample_is_refused(resample: Any) -> None:
    words = 'resample must be one of "step", "episode", "rollout", got '
    with pytest.raises(ValueError, match=rf"{words}{resample!r}\..* whole number >= 1 is a number of steps"):
        check_resample(resample)


@pytest.mark.parametrize("resample", RESAMPLE)
def test_a_good_resample_is_accepted(resample: Any) -> None:
    check_resample(resample)


@pytest.mark.parametrize("resample", ["step", "episode"])
def test_it_is_known_where_all_scales_are_zero(resample: Any) -> None:
    stream = KeyStream(SEED, resample)
    scales = {Scales(0.0): True, Scales(1.0, (0.0, 0.0)): True, Scales(1.0, (0.0, 0.5)): False, Scales(0.5): False}
    for given, silent in scales.items():
        for _ in range(3):  # also of the block that is scaled ahead
            noise = stream.next(2, given, CPU)
            assert noise.silent is silent and bool(noise.scale.any()) is not silent
