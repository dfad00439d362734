"""What does a population cost? One batched forward pass by flipout against one weight matrix per member, and Ray.

    python benchmarks/evolution_speed.py --out docs/benchmarks/evolution_speed.md
    python benchmarks/evolution_speed.py --parts scaling        # on a quiet machine: it needs both cores

One torch thread, medians of rounds in which all arms run in turn; process time, but for Ray, where it is wall-clock time.
Needs `pip install ".[bench,contrib,ray]"`.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
import warnings
from collections.abc import Callable
from datetime import date
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
import torch.nn.functional as F
from evotorch.neuroevolution.net import ModuleExpectingFlatParameters
from gymnasium import spaces
from runs import made_with
from sb3_contrib import ARS
from stable_baselines3.common.env_util import make_vec_env
from torch import nn

from sb3_flipout.envs.vector import GymnasiumVecEnv
from sb3_flipout.evolution import FlipES, Population, RayWorkers
from sb3_flipout.layers import perturb
from sb3_flipout.noise import RowNoise

MEMBERS = 1024
Arms = dict[str, Callable[[], Any]]


def timed(arms: Arms, rounds: int, clock: Callable[[], float] = time.process_time) -> dict[str, float]:
    """Median seconds of each arm, over rounds in which all of them run; one untimed pass warms up."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    with th.no_grad():
        for number in range(rounds + 1):
            for name, run in arms.items():
                began = clock()
                run()
                if number:
                    found[name].append(clock() - began)
    return {name: median(times) for name, times in found.items()}


def network(sizes: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def asked(sizes: tuple[int, ...], members: int, **noise: Any) -> tuple[nn.Module, Any]:
    net = perturb(network(sizes), learn_sigma=False, **noise)
    (group,) = Population(net, members).ask()
    return net, group


def under_noise(net: nn.Module, group: Any, x: th.Tensor) -> Callable[[], Any]:
    def run() -> Any:
        with group.members():
            return net(x)

    return run


# ---- one population step -----------------------------------------------------------------------------------------------


def step(rounds: int) -> str:
    sizes = (64, 512, 512, 16)
    head = "| arm | ms per step | x flipout | MiB beside the mean weights | ms to draw a population | "
    lines = [head + "draw and step, x flipout |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    x = th.randn(MEMBERS, sizes[0])
    ours = {name: asked(sizes, MEMBERS, family=family) for name, family in (("flipout", "gaussian"), ("lowrank", "lowrank"))}
    plain = network(sizes)
    stack = [(th.randn(MEMBERS, o, i) / i**0.5, th.randn(MEMBERS, o)) for i, o in pairwise(sizes)]
    named = dict(zip(dict(plain.named_parameters()), (part for pair in stack for part in pair), strict=True))
    flat = ModuleExpectingFlatParameters(plain)
    vectors = th.cat([part.flatten(1) for part in named.values()], dim=1)

    def bmm() -> th.Tensor:
        h = x[:, None]
        for number, (w, b) in enumerate(stack):
            h = th.baddbmm(b[:, None], h, w.transpose(1, 2))
            h = h.tanh() if number + 1 < len(stack) else h
        return h[:, 0]

    def loop() -> th.Tensor:
        found = []
        for n in range(MEMBERS):
            h = x[n : n + 1]
            for number, (w, b) in enumerate(stack):
                h = F.linear(h, w[n], b[n])
                h = h.tanh() if number + 1 < len(stack) else h
            found.append(h)
        return th.cat(found)

    by_call = th.func.vmap(lambda weights, row: th.func.functional_call(plain, weights, (row[None],))[0])
    by_vector = th.func.vmap(lambda vector, row: flat(vector, row[None])[0])
    arms: Arms = {
        "plain network, one weight matrix for all": lambda: plain(x),
        **{name: under_noise(*made, x) for name, made in ours.items()},
        "bmm, one weight matrix per member": bmm,
        "Python loop over members": loop,
        "torch.func.vmap": lambda: by_call(named, x),
        "EvoTorch 0.6.1": lambda: by_vector(vectors, x),
    }
    outputs = [arms[name]() for name in ("bmm, one weight matrix per member", "Python loop over members", "torch.func.vmap")]
    assert all(th.allclose(outputs[0], other, atol=1e-3) for other in outputs[1:])
    assert th.allclose(by_vector(vectors, x), outputs[0], atol=1e-3)
    times, drawn = timed(arms, rounds), timed(_draws(ours, vectors), max(3, rounds // 4))
    for name, seconds in times.items():
        size = _beside(ours[name][0], ours[name][1].noise) if name in ours else vectors.numel() * 4
        draw = drawn[name if name in ours else "full"]
        both = (seconds + draw) / (times["flipout"] + drawn["flipout"])
        extra = f"{size / 2**20:.1f} | {1000 * draw:.1f} | {both:.1f}" if "plain" not in name else "0 | | "
        lines.append(f"| {name} | {1000 * seconds:.2f} | {seconds / times['flipout']:.1f} | {extra} |")
    return "\n".join(lines)


def _draws(ours: dict[str, Any], vectors: th.Tensor) -> Arms:
    """Draw the noise of a new generation."""

    def fresh(net: nn.Module, group: Any) -> Callable[[], Any]:
        population = Population(net, MEMBERS)

        def run() -> None:
            (new,) = population.ask()
            with new.members():
                new.noise.factors(new.network.plan, th.float32)

        return run

    return {name: fresh(*made) for name, made in ours.items()} | {"full": lambda: vectors.normal_()}


def _beside(net: nn.Module, noise: RowNoise) -> int:
    """Bytes that a population needs beside the mean weights: factors of its rows, and one base draw."""
    from sb3_flipout.layers import flipout_layers, network_of

    factors = noise.factors(network_of(net).plan, th.float32)
    draws = [draw for layer in flipout_layers([net]) for draw in layer.bases()[1].values()]
    return factors.numel() * 4 + sum(draw.numel() * 4 for draw in draws)


def memory(rounds: int) -> str:
    lines = ["| hidden units d | flipout, MiB | lowrank, MiB | one matrix per member, MiB |", "|---:|---:|---:|---:|"]
    for d in (64, 128, 256, 512, 1024, 2048):
        sizes, found = (64, d, d, 16), []
        for family in ("gaussian", "lowrank"):
            net, group = asked(sizes, MEMBERS, family=family)
            found.append(f"{_beside(net, group.noise) / 2**20:.1f}")
        weights = sum((i + 1) * o for i, o in pairwise(sizes))
        lines.append(f"| {d} | {found[0]} | {found[1]} | {MEMBERS * weights * 4 / 2**20:,.0f} |")
    return "\n".join(lines)


# ---- share of plain inference ------------------------------------------------------------------------------------------


def share(rounds: int) -> str:
    sizes, lines = (
        (64, 256, 256, 16),
        ["| population | plain, million rows per second | flipout | lowrank |", "|---:|---:|---:|---:|"],
    )
    for members in (1024, 4096, 16384, 65536):
        x, plain = th.randn(members, sizes[0]), network(sizes)
        arms: Arms = {"plain": lambda plain=plain, x=x: plain(x)}
        for family in ("gaussian", "lowrank"):
            arms[family] = under_noise(*asked(sizes, members, family=family), x)
        times = timed(arms, max(5, rounds * 4096 // members // 4))
        shares = [f"{times['plain'] / times[family]:.2f}" for family in ("gaussian", "lowrank")]
        lines.append(f"| {members:,} | {members / times['plain'] / 1e6:.2f} | {shares[0]} | {shares[1]} |")
    return "\n".join(lines)


# ---- environment steps per second --------------------------------------------------------------------------------------


def environments(rounds: int) -> str:
    def vectorised() -> Any:
        return GymnasiumVecEnv(gym.make_vec("CartPole-v1", MEMBERS, vectorization_mode="vector_entry_point"))

    settings: dict[str, Any] = dict(population_size=MEMBERS, seed=0, device="cpu")
    models: dict[str, Any] = {
        "FlipES, numpy-vectorised CartPole": FlipES("FlipoutMlpPolicy", vectorised(), **settings),
        "FlipES, DummyVecEnv": FlipES("FlipoutMlpPolicy", make_vec_env("CartPole-v1", MEMBERS), **settings),
        "ARS of sb3-contrib, one environment": ARS("MlpPolicy", "CartPole-v1", n_delta=MEMBERS // 2, seed=0, device="cpu"),
        "ARS of sb3-contrib, 16 in DummyVecEnv": ARS(
            "MlpPolicy", make_vec_env("CartPole-v1", 16), n_delta=MEMBERS // 2, seed=0, device="cpu"
        ),
    }
    lines = ["| what | environment steps per second | of them in members' episodes |", "|---|---:|---:|"]
    for name, model in models.items():
        model.learn(1)
        before, began, counted = model.num_timesteps, time.process_time(), _count_used(model)
        model.learn(1, reset_num_timesteps=False)
        seconds, steps = time.process_time() - began, model.num_timesteps - before
        used = f"{sum(counted) / seconds:,.0f}" if counted is not None else "not counted"
        lines.append(f"| {name} | {steps / seconds:,.0f} | {used} |")
    return "\n".join(lines)


def _count_used(model: Any) -> list[float] | None:
    """Steps of members' episodes, where environments that wait for others step too: CartPole's return is its length."""
    if not isinstance(model, FlipES):
        return None
    counted: list[float] = []
    tell = model.population.tell
    model.population.tell = lambda fitness: (counted.append(float(fitness.sum())), tell(fitness))[1]  # type: ignore[method-assign]
    return counted


# ---- Ray ---------------------------------------------------------------------------------------------------------------


class Sleeps(gym.Env[np.ndarray, np.int64]):
    """A simulator that takes its time, and no processor."""

    observation_space, action_space = spaces.Box(-1, 1, (4,)), spaces.Discrete(2)

    def reset(self, **kwargs: Any) -> Any:
        super().reset(**kwargs)
        self.left = 50
        return np.zeros(4, dtype=np.float32), {}

    def step(self, action: Any) -> Any:
        time.sleep(0.002)
        self.left -= 1
        return self.np_random.normal(size=4).astype(np.float32), float(action), self.left == 0, False, {}


def cartpoles() -> Any:
    return make_vec_env("CartPole-v1", 16)


def sleeping() -> Any:
    return make_vec_env(Sleeps, 1)  # type: ignore[arg-type]


def scaling(rounds: int) -> str:
    import ray

    ray.init(num_cpus=32, include_dashboard=False, log_to_driver=False)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    lines = [
        "| case | workers | steps per second | x one worker | seconds per generation beside the playing |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, make_env, counts, members in (
        ("CartPole, 512 members", cartpoles, (1, 2), 512),
        ("simulators that sleep 2 ms per step, 64 members", sleeping, (1, 2, 4, 16), 64),
    ):
        one = 0.0
        for count in counts:
            with RayWorkers(make_env, count, members_per_chunk=32 if members > 64 else 4) as workers:
                env = make_env()
                model = FlipES("FlipoutMlpPolicy", env, population_size=members, workers=workers, seed=0, device="cpu")
                rates, rest = _generations(model, max(3, rounds // 5))
            one = one or rates
            lines.append(f"| {name} | {count} | {rates:,.0f} | {rates / one:.2f} | {rest:.3f} |")
    ray.shutdown()
    return "\n".join(lines)


def _generations(model: FlipES, n: int) -> tuple[float, float]:
    """Steps per second, and seconds per generation in which no worker plays: weights, estimate, optimizer."""
    play, spent = model._play_elsewhere, []

    def timed_play(*args: Any) -> Any:
        began = time.perf_counter()
        found = play(*args)
        spent.append(time.perf_counter() - began)
        return found

    model._play_elsewhere = timed_play  # type: ignore[method-assign]
    model.learn(1)
    spent.clear()
    before, began = model.num_timesteps, time.perf_counter()
    for _ in range(n):
        model.learn(1, reset_num_timesteps=False)
    seconds = time.perf_counter() - began
    return (model.num_timesteps - before) / seconds, (seconds - sum(spent)) / n


# ---- variance ----------------------------------------------------------------------------------------------------------


def variance(rounds: int) -> str:
    """Linear 32-32, each member judged on inputs of its own: fitness -|y - target|^2 / 32, no shaping."""
    lines = ["| members | arm | variance of the estimate, over IdealES | squared bias, over its standard error squared |"]
    lines.append("|---:|---|---:|---:|")
    kinds: dict[str, tuple[dict[str, Any], int]] = {
        "IdealES: a full draw for each member": (dict(noise_sharing="independent"), 1),
        "flipout, 1 base draw": ({}, 1),
        "flipout, 8 base draws": ({}, 8),
        "flipout, 32 base draws": ({}, 32),
        "lowrank": (dict(family="lowrank"), 1),
    }
    for members in (64, 1024):
        ideal = 0.0
        for name, (noise, bases) in kinds.items():
            draws = _estimates(members, bases, noise, 20 * rounds)
            spread = float(draws.var(0).sum())
            ideal = ideal or spread
            bias = float((draws.mean(0) - _exact()).square().sum()) / (spread / len(draws))
            lines.append(f"| {members:,} | {name} | {spread / ideal:.2f} | {bias:.2f} |")
    return "\n".join(lines)


def _problem() -> tuple[nn.Linear, th.Tensor, th.Tensor]:
    th.manual_seed(0)
    return nn.Linear(32, 32, bias=False).double(), th.randn(1024, 32).double(), th.randn(1024, 32).double()


def _exact() -> th.Tensor:
    net, x, target = _problem()
    loss = (net(x) - target).square().mean(1).mean()
    return th.autograd.grad(loss, net.weight)[0]


def _estimates(members: int, bases: int, noise: dict[str, Any], times: int) -> th.Tensor:
    net, x, target = _problem()
    module = perturb(nn.Sequential(net), learn_sigma=False, sigma_init=0.25, **noise)
    population, found = Population(module, members, base_perturbations=bases, shaping="none"), []
    generator = th.Generator().manual_seed(1)
    for _ in range(times):
        some = th.randint(1024, (members // 2,), generator=generator).repeat_interleave(2)  # twins are judged alike
        fitness = th.zeros(members, dtype=th.float64)
        for group in population.ask():
            with th.no_grad(), group.members():
                fitness[group.rows] = -(module(x[some[group.rows]]) - target[some[group.rows]]).square().mean(1)
        module.zero_grad()
        population.tell(fitness)
        found.append(module[0].weight.grad.clone())
    return th.stack(found)


# ---- the paper's comparison --------------------------------------------------------------------------------------------

# Wen et al. 2018, section 4.4: seconds per update, FlipES on one GPU, and cpuES on 40 cores.
PAPER = {32: (0.12, 0.51), 128: (0.13, 1.22), 512: (0.18, 5.10), 2048: (1.86, 38.0)}


def paper(rounds: int) -> str:
    lines = [
        "| hidden units | FlipES, s per update | one member after another, s | cores equivalent | paper: FlipES on a GPU, s | "
        "paper: 40 cores, s |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    samples, some = 5000, 50
    for d, theirs in PAPER.items():
        net = perturb(network((784, d, 10)), learn_sigma=False)
        population = Population(net, samples)
        x, y = th.rand(samples, 784), th.randint(10, (samples,))

        def update(net: nn.Module = net, population: Population = population, x: th.Tensor = x, y: th.Tensor = y) -> None:
            (group,) = population.ask()
            with group.members():
                fitness = -F.cross_entropy(net(x), y, reduction="none")
            population.tell(fitness)

        weights = [part for part in network((784, d, 10)).parameters()]

        def one_by_one(weights: list[nn.Parameter] = weights, x: th.Tensor = x, y: th.Tensor = y) -> None:
            total = [th.zeros_like(part) for part in weights]
            for n in range(some):
                noise = [th.randn_like(part) for part in weights]
                w1, b1, w2, b2 = (part + 0.02 * draw for part, draw in zip(weights, noise, strict=True))
                fitness = -F.cross_entropy(F.linear(F.linear(x[n : n + 1], w1, b1).tanh(), w2, b2), y[n : n + 1])
                for part, draw in zip(total, noise, strict=True):
                    part.add_(draw, alpha=float(fitness))

        times = timed({"ours": update, "loop": one_by_one}, 3)
        loop = times["loop"] * samples / some
        lines.append(f"| {d} | {times['ours']:.3f} | {loop:.2f} | {loop / times['ours']:.0f} | {theirs[0]} | {theirs[1]} |")
    return "\n".join(lines)


PARTS: dict[str, tuple[str, Callable[[int], str]]] = {
    "step": (f"One population step: {MEMBERS:,} members, 64-512-512-16", step),
    "memory": (f"Memory of {MEMBERS:,} members, 64-d-d-16", memory),
    "share": ("Share of plain batched inference, 64-256-256-16", share),
    "environments": (f"CartPole, {MEMBERS:,} members: environment steps per second", environments),
    "scaling": ("Workers on Ray, wall-clock time", scaling),
    "variance": ("Variance of the estimate", variance),
    "paper": ("The paper's comparison: 784-d-10, 5,000 samples per update", paper),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    th.set_num_threads(1)
    warnings.simplefilter("ignore")
    text = args.out.read_text() if args.out and args.out.exists() else "# What does a population cost?\n"
    for name in args.parts:
        title, part = PARTS[name]
        made, before = made_with(), text.split(f"\n## {title}\n")[0]
        rest = text[len(before) :].split("\n## ", 2)[2:]
        after = "".join(f"\n## {other}" for other in rest)
        told = f"`python benchmarks/evolution_speed.py --parts {name}`, {date.today()}, commit {made['commit']}, torch "
        told += f"{made['torch']}, {platform.machine()}, one thread."
        section = f"\n## {title}\n\n{told}\n\n{part(args.rounds)}\n"
        print(section, flush=True)
        text = before + section + after
        if args.out:
            args.out.write_text(text)


if __name__ == "__main__":
    main()
