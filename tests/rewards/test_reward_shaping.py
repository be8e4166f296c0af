"""Shaping of scores: the numbers of the papers' code, running statistics, several processes."""

import json
import math

import pytest
import torch
import torch.multiprocessing as mp

from rewards import RewardError
from rewards.combining.shaping import (
    Z85,
    Moments,
    RunningStats,
    group_zscore,
    log_sigmoid_centred,
    par,
    reference_level,
)

REFERENCES = torch.tensor([0.5, -0.5, 1.5, 0.0], dtype=torch.float64)
SCORES = torch.tensor([1.0, 0.0, -2.0], dtype=torch.float64)


# The golden numbers of the authors' code are float32's.
FLOAT32 = 1e-7


def test_log_sigmoid_centred_golden():
    level = reference_level(REFERENCES)
    assert level.item() == pytest.approx(1.14145279, abs=FLOAT32)
    # mean 3/8, squared deviations (1 + 49 + 81 + 9) / 64, a quarter of it the variance
    assert level.item() == pytest.approx(0.375 + Z85 * (140 / 64 / 4) ** 0.5, abs=1e-14)
    shaped = log_sigmoid_centred(SCORES, level)
    assert shaped.tolist() == pytest.approx([-0.76637262, -1.41859555, -3.18376493], abs=FLOAT32)
    assert 0.5 * math.erfc(-Z85 / math.sqrt(2)) == pytest.approx(0.85, abs=1e-12)
    each = log_sigmoid_centred(SCORES, SCORES)
    assert each.tolist() == pytest.approx([-math.log(2)] * 3), "at the reference the probability is one half"


def test_log_sigmoid_does_not_underflow_and_has_its_gradient():
    scores = torch.tensor([-1000.0, 0.0, 1000.0], requires_grad=True)
    shaped = log_sigmoid_centred(scores, 0.0)
    assert shaped.tolist() == pytest.approx([-1000.0, -math.log(2), 0.0])
    shaped.sum().backward()
    assert scores.grad.tolist() == pytest.approx([1.0, 0.5, 0.0])


def test_par_golden():
    assert par(SCORES, REFERENCES).tolist() == pytest.approx([0.63715827, 0.42060637, 0.10169971], abs=FLOAT32)
    own = torch.stack([REFERENCES, REFERENCES + 1, REFERENCES - 2])
    shifted = par(torch.tensor([1.0, 1.0, -2.0], dtype=torch.float64), own)
    assert shifted.tolist() == pytest.approx([0.63715827, 0.42060637, 0.42060637], abs=FLOAT32)
    assert par(SCORES, REFERENCES[:1]).tolist() == pytest.approx([1 / (1 + math.exp(0.5 - s)) for s in SCORES])


def test_group_zscore():
    scores = torch.tensor([1.0, 10.0, 3.0, 10.0, 7.0, math.nan], dtype=torch.float64)
    shaped = group_zscore(scores, ["a", "b", "a", "b", "alone", "a"], eps=0.5)
    # a: mean 2, population std 1; b: equal scores; the NaN belongs to a and does not spoil it.
    assert shaped[:5].tolist() == pytest.approx([-1 / 1.5, 0, 1 / 1.5, 0, 0]) and shaped[5].isnan()
    sample = group_zscore(scores[[0, 2]], [7, 7], eps=0.0, unbiased=True)
    assert sample.tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)])
    with pytest.raises(RewardError, match="1 groups for 2 scores"):
        group_zscore(scores[:2], ["a"])


def test_group_zscore_gradient():
    scores = torch.tensor([0.3, -1.0, 2.0, 2.0, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: group_zscore(s[:3], ["x"] * 3), scores)
    group_zscore(scores[3:], ["x", "x"]).sum().backward()
    assert scores.grad.isfinite().all(), "equal scores have no slope, not a NaN"


def test_moments_of_merged_batches_are_those_of_all():
    values = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-3 + 1e4
    merged = Moments()
    for chunk in values.split([1, 40, 9, 50]):
        merged = merged.merged(Moments.of(chunk.tolist()))
    assert merged.count == 100 and merged.mean == pytest.approx(values.mean().item(), abs=1e-9)
    assert merged.std == pytest.approx(values.std(unbiased=False).item(), rel=1e-6)
    assert Moments().merged(Moments()) == Moments() and Moments().std == 0.0


def test_running_stats_before_and_after():
    first, second = torch.tensor([1.0, 3.0]), torch.tensor([5.0, 7.0])
    before, after = RunningStats(), RunningStats(update_before=False)
    assert before(first).tolist() == pytest.approx([-1.0, 1.0])
    assert after(first).tolist() == [1.0, 3.0], "nothing seen yet"
    # All four: mean 4, variance (9 + 1 + 1 + 9) / 4 = 5.
    assert before(second).tolist() == pytest.approx([1 / 5**0.5, 3 / 5**0.5])
    assert after(second).tolist() == pytest.approx([3.0, 5.0]), "by mean 2 and deviation 1 of the first batch"
    assert before.moments == after.moments == {"*": Moments(4, 4.0, 20.0)}


def test_running_stats_keys_warm_up_frozen_and_nan():
    stats = RunningStats(warm_up=3)
    scores = torch.tensor([0.0, 10.0, 2.0, math.nan])
    shaped = stats(scores, ["a", "b", "a", "a"])
    assert shaped[:3].tolist() == [0.0, 10.0, 2.0] and shaped[3].isnan(), "two of a and one of b: still warming up"
    # a is now 0, 2, 4: mean 2, variance 8/3
    assert stats(torch.tensor([4.0]), ["a"]).item() == pytest.approx(2 / (8 / 3) ** 0.5)
    stats.frozen = True
    stats(torch.tensor([100.0]), ["a"])
    assert stats.moments["a"] == Moments(3, 2.0, 8.0) and stats.moments["b"].count == 1
    with pytest.raises(RewardError, match="warm_up is 0"):
        RunningStats(warm_up=0)


def test_running_stats_state_and_gradient(tmp_path):
    stats = RunningStats()
    stats.update(torch.tensor([1.0, 2.0, 6.0]), ["a", "b", "a"])
    torch.save(stats.state_dict(), tmp_path / "state.pt")
    other = RunningStats()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.moments == stats.moments
    scores = torch.tensor([1.0, 6.0], requires_grad=True)
    other.normalise(scores, ["a", "a"]).sum().backward()
    assert scores.grad.tolist() == pytest.approx([0.4, 0.4])


def _rank(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    stats, own = RunningStats(), RunningStats(distributed=False)
    scores = torch.tensor([1.0, 3.0]) if rank == 0 else torch.tensor([5.0, 7.0, 7.0])
    keys = ["a", "a"] if rank == 0 else ["a", "a", "b"]
    stats.update(scores, keys)
    own.update(scores, keys)
    (folder / f"{rank}.json").write_text(json.dumps([stats.get_extra_state(), own.get_extra_state()]))
    torch.distributed.destroy_process_group()


def test_running_stats_of_two_processes(tmp_path):
    # Forked, for a spawned process would import everything again.
    mp.start_processes(_rank, args=(tmp_path,), nprocs=2, start_method="fork")
    (first, alone), (second, _) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second == {"a": [4, 4.0, 20.0], "b": [1, 7.0, 0.0]}
    assert alone == {"a": [2, 2.0, 2.0]}
