"""Demo: DQN that explores DeepSea by weight noise, next to stock DQN with epsilon-greedy; run by `make demo`.

    python examples/demo.py [--out demo_output] [--seed 0] [--size 14] [--no-comparison]

DeepSea (Osband et al.) is a grid that a diver falls through, one row a step, left or right. One treasure lies in the bottom
right corner, each step to the right costs a little, and 2^14 random dives find the treasure once. With `members=10` the
weight noise has ten keys, so one network is ten value functions, which disagree where nobody has been yet: each dive follows
one of them. Trains until more than 90 of the last 100 dives reach the treasure, and then stock DQN for as many dives.

Leaves models, TensorBoard logs and a picture in demo_output/, and says where each of them lies. It takes a minute or two. The
exit status is 1 if the treasure was not learned.
"""

import argparse
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch as th
from matplotlib.figure import Figure
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_flipout.callbacks import MonitorNoise
from sb3_flipout.envs import DeepSea

WINDOW, NEEDED, LIMIT = 100, 90, 800  # episodes
DQN_SETTINGS = dict(
    learning_rate=1e-3,
    batch_size=128,
    buffer_size=50_000,
    learning_starts=100,
    train_freq=1,
    target_update_interval=4,
    device="cpu",
)
NET = dict(net_arch=[50, 50])
#: Policy, its settings, and how epsilon falls: weight noise explores alone.
POLICIES = {
    "flipout": (
        "FlipoutMlpPolicy",
        dict(members=10, prior_scale=0.35),
        dict(exploration_initial_eps=0.0, exploration_final_eps=0.0),
    ),
    "stock": ("MlpPolicy", {}, dict(exploration_fraction=0.25, exploration_final_eps=0.1)),
}
LABELS = {"flipout": "weight noise (FlipoutMlpPolicy, 10 members)", "stock": "epsilon-greedy (stock MlpPolicy)"}


@dataclass
class Result:
    """What a training has seen: visits of each cell, and whether each episode reached the treasure."""

    visits: np.ndarray
    reached: list[bool] = field(default_factory=list)

    @property
    def learned(self) -> bool:
        return sum(self.reached[-WINDOW:]) > NEEDED


class Watch(BaseCallback):
    """Notes visits and ends of episodes; stops when the treasure is learned, or at the limit."""

    def __init__(self, size: int, limit: int) -> None:
        super().__init__()
        self.result, self.limit = Result(np.zeros((size, size), dtype=int)), limit
        self._last: deque[bool] = deque(maxlen=WINDOW)

    def _on_step(self) -> bool:
        result = self.result
        result.visits.flat[int(self.model._last_obs[0].argmax())] += 1
        if self.locals["dones"][0]:
            result.reached.append(bool(self.locals["infos"][0]["reached_goal"]))
            self._last.append(result.reached[-1])
            self.logger.record("rollout/treasure_rate", float(np.mean(self._last)))
        return not result.learned and len(result.reached) < self.limit


def train(name: str, out: Path, seed: int, size: int, limit: int) -> Result:
    """Train one policy until the treasure is learned, or for so many episodes; save it and give what it has seen."""
    policy, noise, epsilon = POLICIES[name]
    env = make_vec_env(lambda: DeepSea(size, mapping_seed=seed), seed=seed)
    logs, settings = str(out / "tensorboard"), {**DQN_SETTINGS, **epsilon}
    model = DQN(policy, env, policy_kwargs={**NET, **noise}, seed=seed, tensorboard_log=logs, **settings)
    watch = Watch(size, limit)
    callbacks: list[BaseCallback] = [watch, MonitorNoise(every=1_000)] if name == "flipout" else [watch]
    print(f"\n{LABELS[name]}: {limit} dives at most", flush=True)
    start = time.perf_counter()
    model.learn(limit * size, callback=callbacks, tb_log_name=name, progress_bar=True, log_interval=20)
    model.save(out / f"{name}_dqn_deep_sea.zip")
    result = watch.result
    word = "learned" if result.learned else "not learned"
    print(
        f"{LABELS[name]}: treasure {word} after {len(result.reached)} dives, reached {sum(result.reached)} times, "
        f"{time.perf_counter() - start:.0f} s"
    )
    return result


def plot(results: dict[str, Result], size: int, out: Path) -> Path:
    """Draw where each agent has been, and how often the treasure was reached, dive by dive."""
    figure = Figure(figsize=(4.2 * (len(results) + 1), 4.4), layout="constrained")  # no pyplot: no window, no display needed
    maps = figure.subplots(1, len(results) + 1)
    curve = maps[-1]
    top = max(result.visits.max() for result in results.values())
    for axes, (name, result) in zip(maps, results.items(), strict=False):
        never = np.ma.masked_equal(result.visits, 0)
        image = axes.imshow(never, cmap="viridis", norm="log", vmin=1, vmax=top)
        axes.plot(size - 1, size - 1, marker="*", markersize=14, color="gold", markeredgecolor="black")
        axes.set(title=LABELS[name].replace(" (", "\n("), xticks=[], yticks=[], xlabel="where it has been (white: never)")
        of_all = np.array(result.reached, dtype=float)
        curve.plot(np.arange(1, len(of_all) + 1), of_all.cumsum(), label=LABELS[name].split(" (")[0])
    figure.colorbar(image, ax=list(maps[:-1]), label="visits", shrink=0.8)
    curve.set(
        title=f"treasures found, DeepSea {size} x {size}", xlabel="dive", ylabel="dives that reached the treasure so far"
    )
    curve.legend()
    path = out / "treasure.png"
    figure.savefig(path, dpi=150)
    return path


def main() -> int:
    """Train, plot, and say where everything lies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="output folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument("--size", type=int, default=14, help="rows and columns of DeepSea (default: %(default)s)")
    parser.add_argument("--no-comparison", action="store_true", help="do not train stock DQN")
    arguments = parser.parse_args()
    out, seed, size = arguments.out, arguments.seed, arguments.size
    out.mkdir(parents=True, exist_ok=True)
    th.set_num_threads(1)  # the nets are small

    results = {"flipout": train("flipout", out, seed, size, LIMIT)}
    if not arguments.no_comparison:
        results["stock"] = train("stock", out, seed, size, len(results["flipout"].reached))
    picture = plot(results, size, out)

    print(f"""
picture  {picture}
model    {out / "flipout_dqn_deep_sea.zip"}
logs     {out / "tensorboard"}

See the logs:   tensorboard --logdir {out / "tensorboard"}   (rollout/treasure_rate, noise/...)
Next:           python examples/05_dqn_deep_exploration.py   (how the members come to disagree)
                python examples/06_anneal_and_watch.py       (PPO, and what the callbacks show)
""")
    ours = results["flipout"]
    if not ours.learned:
        print(f"FAILED: the treasure was not learned within {len(ours.reached)} dives.", file=sys.stderr)
        return 1
    stock = f"; epsilon-greedy found it {sum(results['stock'].reached)} times in as many" if "stock" in results else ""
    print(f"Learned: weight noise found the treasure {sum(ours.reached)} times in {len(ours.reached)} dives{stock}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
