"""Demo: PPO that explores CartPole-v1 by weight noise, next to stock PPO; run by `make demo`.

    python examples/demo.py [--out demo_output] [--seed 0] [--no-comparison]

Trains until the mean weights (`deterministic=True`) score at least 475 on average over 20 episodes, and then stock PPO in
the same way. Leaves models, TensorBoard logs and a learning curve in demo_output/, and says where each of them lies.
It takes a minute or two on one core. The exit status is 1 if the flipout policy did not reach 475.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch as th
from matplotlib.figure import Figure
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import EvalCallback, StopTrainingOnRewardThreshold
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import LinearSchedule

import sb3_flipout  # noqa: F401  (gives PPO the policy names "FlipoutMlpPolicy" and so on)

ENV, THRESHOLD, EPISODES, MAX_STEPS, EVAL_EVERY = "CartPole-v1", 475.0, 20, 100_000, 2048
LABELS = {"flipout": "FlipoutMlpPolicy, mean weights", "stock": "MlpPolicy (stock SB3)"}

# rl_zoo3's tuned hyperparameters for CartPole-v1; no entropy bonus.
PPO_SETTINGS = dict(
    n_steps=32,
    batch_size=256,
    gae_lambda=0.8,
    gamma=0.98,
    n_epochs=20,
    learning_rate=LinearSchedule(1e-3, 0.0, 1.0),
    clip_range=LinearSchedule(0.2, 0.0, 1.0),
    ent_coef=0.0,
    device="cpu",
)
# Gaussian noise on all weights that the action depends on, new for every environment at every step, with learned sigma.
POLICIES = {
    "flipout": ("FlipoutMlpPolicy", dict(family="gaussian", sigma_init=0.5, resample="step")),
    "stock": ("MlpPolicy", {}),
}


def train(name: str, out: Path, seed: int) -> float:
    """Train one policy up to the threshold or MAX_STEPS, save it, and return the score of its last evaluation."""
    policy, policy_kwargs = POLICIES[name]
    env = make_vec_env(ENV, n_envs=8, seed=seed)
    model = PPO(policy, env, policy_kwargs=policy_kwargs, seed=seed, tensorboard_log=str(out / "tensorboard"), **PPO_SETTINGS)
    evaluation = EvalCallback(
        make_vec_env(ENV, n_envs=EPISODES, seed=seed + 1000),
        callback_on_new_best=StopTrainingOnRewardThreshold(THRESHOLD),
        n_eval_episodes=EPISODES,
        eval_freq=EVAL_EVERY // env.num_envs,
        log_path=str(out / "evaluations" / name),
        deterministic=True,
        verbose=0,
    )
    print(f"\n{policy}: training on {ENV} until {THRESHOLD:g} is reached, {MAX_STEPS} steps at most")
    start = time.perf_counter()
    model.learn(MAX_STEPS, callback=evaluation, tb_log_name=name, progress_bar=True)
    model.save(out / f"{name}_ppo_cartpole.zip")
    score = evaluation.last_mean_reward
    print(f"{policy}: {score:.1f} after {model.num_timesteps} steps, {time.perf_counter() - start:.0f} s")
    return score


def plot(names: list[str], out: Path) -> Path:
    """Draw the evaluations of each policy against training steps."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")  # without pyplot: no window, no display needed
    axes = figure.subplots()
    for name in names:
        log = np.load(out / "evaluations" / name / "evaluations.npz")
        (line,) = axes.plot(log["timesteps"], log["results"].mean(1), marker="o", markersize=3, label=LABELS[name])
        axes.fill_between(log["timesteps"], log["results"].min(1), log["results"].max(1), alpha=0.15, color=line.get_color())
    axes.axhline(THRESHOLD, color="grey", linestyle="--", label=f"threshold {THRESHOLD:g}")
    axes.set_xlabel("environment steps")
    axes.set_ylabel("return of the deterministic policy")
    axes.set_title(f"PPO on {ENV}: mean and range of {EPISODES} evaluation episodes")
    axes.legend()
    path = out / "learning_curve.png"
    figure.savefig(path, dpi=150)
    return path


def main() -> int:
    """Train, plot, and say where everything lies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="output folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument("--no-comparison", action="store_true", help="do not train stock PPO")
    arguments = parser.parse_args()
    out: Path = arguments.out
    th.set_num_threads(1)  # the nets are small

    names = ["flipout"] if arguments.no_comparison else ["flipout", "stock"]
    scores = {name: train(name, out, arguments.seed) for name in names}
    curve = plot(names, out)

    model = out / "flipout_ppo_cartpole.zip"
    print(f"""
model           {model}
learning curve  {curve}
evaluations     {out / "evaluations"}
logs            {out / "tensorboard"}

See the logs:   tensorboard --logdir {out / "tensorboard"}
Load and play:
    import stable_baselines3 as sb3
    model = sb3.PPO.load("{model}")  # imports sb3_flipout by itself
    print(sb3.common.evaluation.evaluate_policy(model, sb3.common.env_util.make_vec_env("{ENV}")))
""")
    if scores["flipout"] < THRESHOLD:
        print(f"FAILED: the flipout policy scored {scores['flipout']:.1f}, below {THRESHOLD:g}.", file=sys.stderr)
        return 1
    print(f"Reached: the mean weights scored {scores['flipout']:.1f} (threshold {THRESHOLD:g}).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
