"""Write docs/algorithms.md from the registration table: which names each algorithm has, what is perturbed, what is replayed.

python docs/make_algorithms.py
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

from sb3_flipout.policies import ActorSettings, FlipoutPolicyMixin, NoiseSettings, OnPolicySettings, ValueSettings
from sb3_flipout.policies.sac_td3 import ActorMixin
from sb3_flipout.registration import ALIASES

PAGE = Path(__file__).parent / "algorithms.md"


class Facts(NamedTuple):
    """What holds for all policies made with one mixin."""

    perturbed: str
    all: str
    learning: str
    prediction: str
    settings: type[NoiseSettings]


_EXACTLY = "replayed exactly: log-probabilities, entropies and values"
_FRESH = "nothing is replayed: each gradient step draws fresh noise, for each row"
_MEAN = "mean weights"

#: By the name of the mixin; the first one among the bases of a policy class counts.
FACTS: dict[str, Facts] = {
    "RecurrentMixin": Facts(
        "extractor, the actor's LSTM, hidden layers of the policy, action layer",
        "hidden layers of the values, the critic's LSTM, value layer",
        f"{_EXACTLY}, over whole sequences",
        _MEAN,
        OnPolicySettings,
    ),
    "OnPolicyMixin": Facts(
        "extractor, hidden layers of the policy, action layer",
        "hidden layers of the values, value layer",
        _EXACTLY,
        _MEAN,
        OnPolicySettings,
    ),
    "ValueMixin": Facts(
        "the whole value network, and its target",
        "the same",
        f"{_FRESH}; with `members` each row is under one of K perturbations, always the same",
        f"{_MEAN}; with `members` their vote",
        ValueSettings,
    ),
    "ActorMixin": Facts(
        "the whole actor", "the critics", f'{_FRESH}; with `update_noise="mean"` mean weights learn', _MEAN, ActorSettings
    ),
}

#: Algorithms that are left out, and why.
REFUSED = {
    "ARS": "is parameter noise itself, on the whole parameter vector; asking for a flipout policy says so",
}

HEAD = """# Algorithms and policy names

<!-- Made by docs/make_algorithms.py from the registration table. Do not edit. -->

`import sb3_flipout` gives these names to the stock algorithm classes. Those marked with a star are of sb3-contrib:
`pip install ".[contrib]"`.

"""

NOTES = """
"Perturbed" is what `perturb="policy"` means, the default. `"heads"` is the last layer of it, `"all"` adds what its
column says. Of what is perturbed, `layers="linear"` leaves all other kinds out, and `layers="hidden"` takes the
hidden-to-hidden weights of LSTMs and GRUs alone. An extractor that is shared is perturbed once, and its noise then reaches all
that is computed from it; only the critics of {critics} see its mean weights, unless `"all"` is asked for.

Settings beside those of every policy ([settings](settings.md)):

"""


def facts_of(policy_class: type[FlipoutPolicyMixin]) -> Facts:
    """Give the facts of a policy class; an actor-critic says itself which targets it has."""
    facts = next(FACTS[base.__name__] for base in policy_class.__mro__ if base.__name__ in FACTS)
    followed = {name for _, name in getattr(policy_class, "targets", ())}
    perturbed = f"{facts.perturbed}, and its target" if "actor" in followed else facts.perturbed
    more = f"{facts.all}, and their targets" if "critic" in followed else facts.all
    return facts._replace(perturbed=perturbed, all=more)


def own_settings(policy_class: type[FlipoutPolicyMixin]) -> list[str]:
    """Name the settings that not every policy has."""
    common = {field.name for field in fields(NoiseSettings)}
    return [field.name for field in fields(facts_of(policy_class).settings) if field.name not in common]


def table(header: list[str], rows: list[list[str]]) -> str:
    """Format a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def label(algorithm: type) -> str:
    """Name an algorithm, with a star where it is of sb3-contrib."""
    return algorithm.__name__ + ("\\*" if algorithm.__module__.startswith("sb3_contrib") else "")


def page() -> str:
    """Give the text of the page."""
    rows, settings = [], {}
    for algorithm, names in ALIASES.items():
        policy_class = next(iter(names.values()))
        quoted = "<br>".join(f'`"{name}"`' for name in names)
        facts = facts_of(policy_class)
        rows.append([label(algorithm), quoted, facts.perturbed, facts.all, facts.learning, facts.prediction])
        settings.setdefault(tuple(own_settings(policy_class)), []).append(label(algorithm))
    for name, reason in REFUSED.items():
        rows.append([f"{name}\\*", "none", reason, "", "", ""])
    actor_critics = [a for a, names in ALIASES.items() if issubclass(next(iter(names.values())), ActorMixin)]
    critics = ", ".join(label(algorithm) for algorithm in actor_critics)
    header = ["algorithm", "`policy`", "perturbed", 'more with `"all"`', "in the update", "`predict(deterministic=True)`"]
    further = [
        [", ".join(algorithms), ", ".join(f"`{name}`" for name in names) or "none"] for names, algorithms in settings.items()
    ]
    return HEAD + table(header, rows) + NOTES.format(critics=critics) + table(["algorithms", "settings"], further)


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
