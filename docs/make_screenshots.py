"""Make the pictures of docs/tensorboard.md: train two short real runs, open tensorboard, and photograph its pages.

    python docs/make_screenshots.py

Needs Chromium (Debian: ``apt-get install chromium``) beside the package's own dependencies. It trains on one thread for some
minutes, serves the runs on a free port of this machine, and writes docs/images/tensorboard_*.png. With ``--runs FOLDER`` the
runs are kept there, and used again if they are there already.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import torch as th
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.callbacks import CallbackList
from stable_baselines3.common.env_util import make_vec_env

from sb3_flipout.callbacks import AnnealNoise, MonitorNoise, NoiseEvalCallback
from sb3_flipout.envs import DeepSea

IMAGES = Path(__file__).parent / "images"

#: Picture -> run, page of tensorboard with its settings, size of the window.
PAGES: dict[str, tuple[str, str, tuple[int, int]]] = {
    "tensorboard_custom_scalars": ("ppo_cartpole", "custom_scalars&_smoothingWeight=0", (1500, 1830)),
    "tensorboard_members": ("dqn_deepsea", "custom_scalars&_smoothingWeight=0", (1500, 2230)),
    "tensorboard_scalars": ("ppo_cartpole", "scalars&tagFilter=%5Enoise&_smoothingWeight=0", (1500, 1300)),
    "tensorboard_histograms": ("ppo_cartpole", "histograms", (1500, 720)),
    "tensorboard_figure": ("ppo_cartpole", "images", (1000, 680)),
}


def train_ppo(folder: Path) -> None:
    env, eval_env = (make_vec_env("CartPole-v1", n_envs=n, seed=seed) for n, seed in ((8, 0), (4, 100)))
    model = PPO("FlipoutMlpPolicy", env, n_steps=128, seed=0, device="cpu", tensorboard_log=str(folder))
    callbacks = [
        AnnealNoise(1.0, 0.1),
        MonitorNoise(every=1_000),
        NoiseEvalCallback(eval_env, eval_freq=128, n_eval_episodes=8, verbose=0),
    ]
    model.learn(20_000, callback=CallbackList(callbacks), tb_log_name="ppo_cartpole")


def train_dqn(folder: Path) -> None:
    env = make_vec_env(lambda: DeepSea(10, mapping_seed=0), n_envs=1, seed=0)
    model = DQN(
        "FlipoutMlpPolicy", env, learning_rate=1e-3, train_freq=1, target_update_interval=100, batch_size=64,
        learning_starts=100, exploration_initial_eps=0.0, exploration_final_eps=0.0, seed=0, device="cpu",
        policy_kwargs=dict(members=20, prior_scale=3.0, net_arch=[50, 50]), tensorboard_log=str(folder),
    )  # fmt: skip
    evaluation = NoiseEvalCallback(
        make_vec_env(lambda: DeepSea(10, mapping_seed=0), n_envs=1, seed=0),
        eval_freq=500,
        n_eval_episodes=4,
        best_by="vote",
        verbose=0,
    )
    callbacks = CallbackList([MonitorNoise(every=500), evaluation])
    model.learn(5_000, callback=callbacks, tb_log_name="dqn_deepsea", log_interval=10)


def serve(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Start tensorboard and wait until it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", folder.name, "--port", str(port), "--load_fast=false"]
    server = subprocess.Popen(command, cwd=folder.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}/"
    for _ in range(120):
        time.sleep(1)
        try:
            tags = urllib.request.urlopen(f"{address}data/plugin/scalars/tags", timeout=5).read()
        except OSError:
            continue
        if b"noise" in tags:
            return server, address
    server.kill()
    raise RuntimeError("tensorboard did not show the runs within two minutes")


def photograph(address: str, page: str, size: tuple[int, int], path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        raise RuntimeError("Chromium is not installed; on Debian: apt-get install chromium")
    with tempfile.TemporaryDirectory() as profile:
        command = [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}",
            f"--window-size={size[0]},{size[1]}", "--virtual-time-budget=60000", f"--screenshot={path}",
            f"{address}#{page}",
        ]  # fmt: skip
        subprocess.run(command, check=True, timeout=300, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="folder where the runs are kept")
    args = parser.parse_args()
    th.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        root = args.runs or Path(temporary)
        for name, train in (("ppo_cartpole", train_ppo), ("dqn_deepsea", train_dqn)):
            if not (root / name).exists():
                train(root / name)
        for name in ("ppo_cartpole", "dqn_deepsea"):
            server, address = serve(root / name)
            try:
                for picture, (run, page, size) in PAGES.items():
                    if run == name:
                        photograph(address, page, size, IMAGES / f"{picture}.png")
            finally:
                server.terminate()
                server.wait()


if __name__ == "__main__":
    main()
