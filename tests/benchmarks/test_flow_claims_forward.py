"""The claims about forward-process RL: one that needs no training, and the refusals."""

from __future__ import annotations

import pytest

from benchmarks.flow_claims_forward import illusion, main
from benchmarks.flow_toy import Velocity


def test_tiny_gaps_are_unit_advantages_for_scores_alone() -> None:
    """Of 24 normal scores in units of their deviation, the mean |A| is that of a normal, sqrt(2 / pi) = 0.798."""
    scores, floored, rated = illusion(Velocity(), 1)
    assert scores.value == pytest.approx(0.798, abs=0.01)
    assert floored.value > 0.99
    assert rated.value == 1.0


@pytest.mark.parametrize("arguments", [["nothing"], ["--seeds", "1"]])
def test_what_there_is_not_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert ("unknown claim nothing" if arguments == ["nothing"] else "--seeds 1: 2 to 8") in capsys.readouterr().err
