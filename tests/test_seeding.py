"""model/seeding.py: one seed for each place in a run."""

from itertools import product

from model.seeding import step_seed


def test_every_place_has_its_own_seed() -> None:
    """Also in the 32 bits that torch's CPU generator looks at; none is a neighbour's."""
    places = list(product(range(3), range(20), range(4), range(8)))
    seeds = {
        step_seed(seed=seed, step=step, micro=micro, rank=rank) & 0xFFFFFFFF
        for seed, step, micro, rank in places
    }
    assert len(seeds) == len(places)


def test_seeds_are_pinned() -> None:
    """Another value would change what resumed runs draw."""
    assert step_seed(seed=1, step=2, micro=3, rank=4) == 15195315728730727403
