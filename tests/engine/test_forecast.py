"""engine/forecast.py: at what lengths a rate is measured."""
import pytest
from helpers import random_model, random_prompt

from engine import forecast
from engine.refill import Batch
from sample import Sampling


@pytest.mark.parametrize("limit", (1, 2, 3, 9, 64, 200))
@pytest.mark.parametrize("rows", (1, 5))
def test_a_rate_is_measured_on_rows_of_mixed_length(monkeypatch, limit, rows):
    """From a prompt's length to nearly the limit; no row outgrows it meanwhile."""
    model = random_model("qwen2")
    seen = []
    decode = Batch.decode

    def noted(batch, until):
        seen.append(batch.cache.counts.copy())
        decode(batch, until)

    monkeypatch.setattr(Batch, "decode", noted)
    rate = forecast.decoding_rate(
        model, random_prompt(7), rows, limit, Sampling(), seconds=0.2)
    assert rate > 0
    first = seen[0]
    assert first.min() == 6  # the prompt's last token is decoded in the first step
    assert max(counts.max() for counts in seen) < 7 + limit
    if rows > 1 and limit >= 64:
        assert first.max() > 6 + 0.6 * limit
        assert first.mean() == pytest.approx(6 + 0.35 * limit, abs=0.1 * limit)


def forecast_for(**changes):
    """The Forecast of one path of 3,600 tokens, with changes."""
    return forecast.Forecast(**{
        "problems": 1, "paths": 1, "prefixes": 0, "rollouts": 0, "tests": 0, "n": 1,
        "path_length": 3600, "rollout_length": 0, "rate": 1000.0, "fit_seconds": 0.0} | changes)


@pytest.mark.parametrize("changes, said", (
    ({}, "paths 4 s; together 4 s"),
    ({"rate": 1e6}, "paths under 1 s; together under 1 s"),
    ({"rate": 10.0}, "paths 6.0 min; together 6.0 min"),
    ({"rate": 0.1, "fit_seconds": 0.2}, "paths 10.0 h, fit under 1 s; together 10.0 h"),
    ({"prefixes": 10, "rollouts": 10, "rollout_length": 36, "tests": 2},
     "paths 4 s, rollouts 4 s, evaluation 7 s; together 14 s")))
def test_times_are_in_words_and_called_an_estimate(changes, said):
    plan = forecast_for(**changes)
    assert plan.describe_times() == f"{said}, an estimate from {plan.rate:,.0f} tok/s"


def test_a_likely_time_halves_what_is_decoded_alone():
    plan = forecast_for(rate=1.0, prefixes=10, rollouts=2, rollout_length=180, fit_seconds=3600.0)
    assert plan.describe_times().startswith("paths 60.0 min, rollouts 60.0 min, fit 60.0 min; "
                                            "together 3.0 h")
    assert plan.describe_likely().startswith("likely about 2.0 h, if ")
