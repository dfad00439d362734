"""Write the tables of docs/settings.md from the dataclasses of settings: what each means, and its default.

python docs/make_settings.py
"""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from sb3_flipout.policies import ActorSettings, LearningSettings, NoiseSettings, OnPolicySettings, ValueSettings

PAGE = Path(__file__).parent / "settings.md"
BEGIN, END = "<!-- from the dataclasses: python docs/make_settings.py -->", "<!-- end of what is made -->"

#: Columns of defaults: title, and settings as they are where nothing is said.
COLUMNS: dict[str, NoiseSettings] = {
    "PPO, A2C, TRPO and kin": OnPolicySettings(),
    "DQN, QRDQN": ValueSettings(),
    "SAC, TD3 and kin": ActorSettings(),
    "with `members`": ValueSettings(members=10),
}
#: Titles of the tables, and which settings each has: those that its class has and the other classes have not.
TABLES: dict[str, type[NoiseSettings]] = {
    "Of all policies": NoiseSettings,
    "Of PPO, A2C, TRPO and kin besides": OnPolicySettings,
    "Of all that learn from a replay buffer besides": LearningSettings,
    "Of DQN and QRDQN besides": ValueSettings,
    "Of SAC, TD3, DDPG, TQC and CrossQ besides": ActorSettings,
}


def described(kind: type[NoiseSettings]) -> dict[str, str]:
    """Read what the docstring of a class says of each setting, as markdown."""
    found = re.findall(r":param (\w+): (.*?)(?=\n *:|\Z)", kind.__doc__ or "", re.DOTALL)
    return {name: re.sub(r"\s+", " ", text).replace("``", "`").strip() for name, text in found}


def own_names(kind: type[NoiseSettings]) -> list[str]:
    """List the settings that a class adds to those of its parents."""
    inherited = {
        field.name for parent in kind.__mro__[1:] if hasattr(parent, "__dataclass_fields__") for field in fields(parent)
    }
    return [field.name for field in fields(kind) if field.name not in inherited]


def default(settings: NoiseSettings, name: str) -> str:
    """Say the default of a setting as it would be written; a dash where the policy does not have it."""
    if name == "members" and settings is COLUMNS["with `members`"]:
        return "given"
    if not hasattr(settings, name):
        return "-"
    value: Any = settings.falls if name == "schedule" else getattr(settings, name)
    return f"`{value!s}`" if not isinstance(value, str) else f'`"{value}"`'


def table(kind: type[NoiseSettings]) -> str:
    """Write the table of what a class adds."""
    about, columns = described(kind), [title for title, one in COLUMNS.items() if isinstance(one, kind)]
    heads = " | ".join(f"default, {title}" for title in columns)
    lines = [f"| setting | meaning | {heads} |", f"|---|---|{'---|' * len(columns)}"]
    for name in own_names(kind):
        defaults = " | ".join(default(COLUMNS[title], name) for title in columns)
        lines.append(f"| `{name}` | {about[name]} | {defaults} |")
    return "\n".join(lines)


def tables() -> str:
    """Write all tables."""
    return "\n\n".join(f"## {title}\n\n{table(kind)}" for title, kind in TABLES.items())


def page(text: str) -> str:
    """
    Put the tables into the page.

    :param text: The page as it is
    :return: The page with the tables of today
    """
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
