"""docs/algorithms.md is what its script makes of the registration table."""

import importlib.util
from pathlib import Path

import pytest

from sb3_flipout.registration import ALIASES

DOCS = Path(__file__).parent.parent / "docs"
spec = importlib.util.spec_from_file_location("make_algorithms", DOCS / "make_algorithms.py")
make_algorithms = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_algorithms)

ROWS = {line.split(" | ")[0].strip("| \\*"): line for line in make_algorithms.page().splitlines() if line.startswith("| ")}


def test_committed_page_is_up_to_date():
    assert make_algorithms.PAGE.read_text() == make_algorithms.page(), "run: python docs/make_algorithms.py"


@pytest.mark.parametrize("algorithm", ALIASES, ids=lambda algorithm: algorithm.__name__)
def test_each_algorithm_has_a_row_with_all_its_names(algorithm):
    row = ROWS[algorithm.__name__]
    assert row.count('`"Flipout') == len(ALIASES[algorithm])
    assert all(f'`"{name}"`' in row for name in ALIASES[algorithm])


def test_what_is_replayed_goes_by_the_kind_of_algorithm():
    for name in ("PPO", "A2C", "TRPO", "MaskablePPO"):
        assert "replayed exactly" in ROWS[name]
    for name in ("DQN", "QRDQN", "SAC", "TD3", "DDPG", "TQC", "CrossQ"):
        assert "nothing is replayed" in ROWS[name]
    assert "none" in ROWS["ARS"]


def test_facts_are_of_mixins_that_exist():
    used = {base.__name__ for names in ALIASES.values() for policy in names.values() for base in policy.__mro__}
    assert set(make_algorithms.FACTS) <= used
