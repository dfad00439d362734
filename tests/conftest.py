"""One torch thread per worker, the same random numbers in every run, and what several rings' tests need."""

import itertools
import random
import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch as th
from gymnasium.utils import seeding

th.set_num_threads(1)

# Tests of many seconds, and cases that repeat at some length what others of the same test show in the fast tier: they run with
# those marked slow.
SLOW_CASES = re.compile(
    "|".join(
        (
            r"test_stock\.py::test_sigma_frozen_at_zero_trains_bitwise_as_stock\[TRPO-(?!mlp-discrete|dict)",
            r"test_stock\.py::test_sigma_frozen_at_zero_trains_bitwise_as_stock\[A2C-(?!mlp-discrete|image\])",
            r"test_stock\.py::test_every_family_at_sigma_zero_is_stock\[(multiplicative|isotropic|lowrank)",
            r"test_theorem\.py::test_(gradients|a_rows|rows|layers|successive).*\[(multiplicative|dropconnect|isotropic|lowrank)",
            r"test_diagnostics\.py::test_theorem_2_for_the_means\[(4-.*|.*-4)\]",
            r"test_diagnostics\.py::test_the_variance_falls_as_one_over_the_batch_size\[independent",
            r"test_adapt\.py::test_reaches_the_target_on_a_fixed_network\[.*-50\.0\]",
            r"test_lstm_gradients\.py::test_gradcheck\[(?!.*flipout)",
            r"test_save_load\.py::test_loads_in_a_fresh_process_that_never_imported_the_plugin\[(mlp-box|image)\]",
            r"test_demo_atari\.py::test_names_the_extra_when_it_is_missing\[cv2\]",
            r"test_schedule\.py::test_it_falls_with_the_steps_of_training\[(SAC|A2C|DQN)-(cosine|exponential)\]",
            r"test_recurrent\.py::test_without_noise_training_is_stock\[(?!.*(box|dict))",
            r"test_visit_guard\.py::test_nothing_is_said_where_nothing_is_wrong\[(crossq|tqc|qrdqn|ddpg)",
            r"test_demo\.py::test_a_small_sea_is_learned_at_once",
            r"test_atari_names\.py::test_registers_the_games_for_make_atari_env",
            r"test_demo_atari\.py::test_names_the_extra_when_it_is_missing\[ale_py\]",
            r"test_sac_td3_options\.py::test_all_but_contrib_works_without_it",
            r"test_lstm_gradients\.py::test_full_gradcheck",
            r"test_compiled\.py::test_every_noise_compiles\[(?!.*flipout)",
            r"test_(compiled|prediction)\.py::test_(a_)?compiled_.*\[aot_eager\]",
            r"test_replay\.py::test_(ratio_is_one|replay_of_every).*\[TRPO-(dict|image|separate)",
            r"test_on_policy_contrib\.py::test_maskable_ratio_is_one.*\[(dict|image|separate-extractors)-False\]",
            r"test_diagnostics\.py::test_gradient_variance_on_fixed_data_is_that_of_the_formula\[shared\]",
            r"test_matrix\.py::test_all_pass",
            r"test_resume_after_kill\.py::test_killed_training_goes_on\[cartpole\]",
            r"test_registration\.py::test_unregister_takes_everything_back",
            r"test_minatar\.py::test_names_the_extra_when_the_package_is_missing",
            r"test_examples\.py::test_keys_and_replay",
            r"test_noise_eval\.py::test_chance_alone_warns_once_in_a_thousand_times",
            r"test_adapt\.py::test_reaches_the_target_on_a_fixed_network\[(A2C-box|DQN-discrete-kl)",
            r"test_sac_td3_options\.py::test_sigma_frozen_at_zero_is_stock_bit_for_bit\[(TQC|CrossQ|DDPG)",
            r"test_dqn\.py::test_runs_and_learns_sigma\[.*(multiplicative|dropconnect|isotropic|lowrank)",
            r"test_replay\.py::test_replay_of_every_family_and_cadence\[.*(multiplicative|dropconnect|isotropic|lowrank)",
            r"test_on_policy_contrib\.py::test_trpo_trains_every_family.*\[.*(multiplicative|dropconnect|isotropic|lowrank)",
            r"test_sac_td3\.py::test_each_network_learns_under_the_noise_of_its_role\[.*(TQC|CrossQ|DDPG)",
            r"test_theorem\.py::test_(rows|layers)_.*\[factorised",
            r"test_policy_diagnostics\.py::test_deviation_is_that_of_drawn_weights\[.*(multiplicative|isotropic|dropconnect|lowrank)",
        )
    )
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark those cases before `-m` is looked at."""
    for item in items:
        if SLOW_CASES.search(item.nodeid):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def same_in_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed what a test leaves unseeded, so that it sees the same numbers alone, in the suite, and tomorrow."""
    th.set_flush_denormal(False)  # a benchmark sets it
    random.seed(0)
    np.random.seed(0)
    th.manual_seed(0)
    of_entropy, fresh = seeding.np_random, itertools.count()
    # Spaces and environments without a seed would ask the operating system for one.
    monkeypatch.setattr(seeding, "np_random", lambda seed=None: of_entropy(next(fresh) if seed is None else seed))


@pytest.fixture
def untouched_rng() -> Iterator[None]:
    """Fail if the test moves a global random generator of torch or numpy."""
    torch_before, numpy_before = th.get_rng_state(), np.random.get_state()
    yield
    assert th.equal(th.get_rng_state(), torch_before)
    for before, after in zip(numpy_before, np.random.get_state(), strict=True):
        assert np.array_equal(before, after)
