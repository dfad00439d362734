"""Without reinforcement learning: perturbed layers in a plain PyTorch net, for regression that knows what it does not know.

    python examples/04_plain_torch.py [--steps 2000]

Bayes by Backprop (Blundell et al. 2015): learn a mean and a sigma for each weight, by the likelihood of the data under
noisy weights, and a penalty for weights far from the prior. Each row of a batch sees its own weights, by its own key, which
is what flipout is for: the gradients of the rows are not all correlated by one common draw (Wen et al. 2018).

You should see a table in which the predictive spread is small where there are data, |x| <= 1, and grows outside.
"""

import argparse

import torch as th
from torch import nn
from torch.nn.functional import mse_loss

from sb3_flipout import kl_divergence, perturb, perturbed, redraw

NOISE, PRIOR = 0.1, 2.0  # standard deviations: of the data, and of the weights before there are data (in 1/sqrt(fan_in))

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=2000, help="optimiser steps (default: %(default)s)")
steps = parser.parse_args().steps
th.set_num_threads(1)
th.manual_seed(0)

x = th.rand(200, 1) * 2 - 1
y = th.sin(3 * x) + NOISE * th.randn_like(x)

net = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
perturb(net, family="gaussian", sigma_init=0.1)
optimizer = th.optim.Adam(net.parameters(), lr=3e-3)  # made after perturb: it adds the sigmas

for step in range(steps):
    redraw(net, base_key=step)  # the perturbation that the rows share
    keys = th.randint(2**62, (len(x),))  # and what makes it different for each of them
    with perturbed(net, keys):
        loss = mse_loss(net(x), y, reduction="sum") / (2 * NOISE**2)
    loss = loss + kl_divergence(net, PRIOR)  # far from the prior is dear
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# One key, one function: 200 functions, each evaluated at all points.
points, samples = th.linspace(-3, 3, 13), 200
keys = th.arange(samples).repeat_interleave(len(points))
with th.no_grad():
    with perturbed(net, keys):
        functions = net(points.repeat(samples)[:, None]).view(samples, len(points))
    mean = net(points[:, None])[:, 0]  # no noise active: mean weights

print("    x  sin(3x)  mean weights  spread")
for i, point in enumerate(points.tolist()):
    spread = functions[:, i].std().item()
    print(f"{point:5.1f}  {th.sin(3 * points[i]):7.2f}  {mean[i]:12.2f}  {spread:6.2f}{'  data' if abs(point) <= 1 else ''}")
inside = functions[:, points.abs() <= 1].std(0).mean()
outside = functions[:, points.abs() > 1].std(0).mean()
print(f"mean spread: {inside:.3f} inside the data, {outside:.3f} outside, ratio {outside / inside:.1f}")
