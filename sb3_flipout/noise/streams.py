"""The numbers that keep streams of noise apart: every stream of keys is ``fold(seed, number, ...)``.

All of them stand here, so that no two can be the same by accident. They are part of what a saved model means: never renumber.
"""

from enum import IntEnum


class Stream(IntEnum):
    """What a stream of keys is for. The first ones are derived from a policy's seed, the others are seeds of their own."""

    COLLECTION = 0  # keys of the environments, step after step
    EVALUATION = 1  # keys of predictions outside collection
    BASE = 2  # base perturbations: of rollouts, or of acting
    LEARNING_KEYS = 16  # keys of the rows in a gradient step
    LEARNING_BASE = 17  # base perturbations of gradient steps
    PRIOR = 18  # base perturbation of the members' priors
    FIRST_MEMBERS = 19  # which member a transition of a gradient step is learned under first
    TRANSITIONS = 20  # numbers of stored transitions
    POPULATION_KEYS = 21  # keys of an evolution strategy's members, generation after generation
    POPULATION_BASE = 22  # their base perturbations
    POPULATION_ENVIRONMENTS = 23  # seeds of the environments that they play in
    # Seeds of what only looks: training never sees their keys.
    ADAPT = 0xADA
    MONITOR = 0x6D6F6E
    NOISE_EVAL = 0x6576616C
