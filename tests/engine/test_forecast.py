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
        model, [random_prompt(7)], rows, limit, Sampling(), seconds=0.2)
    assert rate > 0
    first = seen[0]
    assert first.min() == 6  # the prompt's last token is decoded in the first step
    assert max(counts.max() for counts in seen) < 7 + limit
    if rows > 1 and limit >= 64:
        assert first.max() > 6 + 0.6 * limit
        assert first.mean() == pytest.approx(6 + 0.35 * limit, abs=0.1 * limit)


def test_hours_are_called_an_estimate():
    plan = forecast.Forecast(
        problems=1, paths=1, prefixes=0, rollouts=0, tests=0, n=1, path_length=3600,
        rollout_length=0, rate=1000.0, fit_seconds=0.0)
    assert plan.describe_hours().endswith("an estimate from 1,000 tok/s")
