"""The knapsack against every choice there is, and what it says when nothing fits."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framequant.errors import ConfigError
from framequant.quantizers.budget import Option, share_out


def options_of(weights: int, sensitivity: float) -> list[Option]:
    return [Option(rate, 1.0, int(weights * rate / 8), sensitivity / 4**rate) for rate in (1, 1.5, 2, 3, 4)]


MODELS = st.lists(st.tuples(st.sampled_from([800, 1600, 2400]), st.floats(0, 100)), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(MODELS, st.floats(1.0, 4.0))
def test_it_keeps_the_budget_and_is_within_one_step_of_the_best(model, bits):
    options = {str(i): options_of(*one) for i, one in enumerate(model)}
    budget = int(bits * sum(weights for weights, _ in model) / 8)
    chosen = share_out(options, budget)
    spent = sum(option.size for option in chosen.values())
    assert spent <= budget
    total = sum(option.loss for option in chosen.values())
    every = [
        sum(option.loss for option in combination)
        for combination in product(*options.values())
        if sum(option.size for option in combination) <= budget
    ]
    # The relaxed solution loses at most what its first step that did not fit would have gained.
    step = max(
        (option.loss - after.loss)
        for name, option in chosen.items()
        for after in [*[o for o in options[name] if o.size > option.size], option]
    )
    assert total <= min(every) + step + 1e-12


def test_the_more_sensitive_linear_gets_the_higher_rate():
    chosen = share_out({"dull": options_of(800, 1.0), "keen": options_of(800, 64.0)}, 400)
    assert chosen["keen"].bits > chosen["dull"].bits
    assert sum(option.size for option in chosen.values()) == 400


def test_an_option_that_costs_more_and_loses_more_is_never_chosen():
    trap = Option(9, 1.0, 150, 50.0)
    chosen = share_out({"a": [Option(1, 1.0, 100, 10.0), trap, Option(2, 1.0, 200, 1.0)]}, 199)
    assert chosen["a"].bits == 1


def test_a_budget_that_nothing_meets_says_what_would():
    with pytest.raises(ConfigError, match=r"0\.8000 bits per weight.*1\.0000 bits at least"):
        share_out({"a": options_of(800, 1.0)}, 80, 800)
