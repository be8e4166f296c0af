"""The parts of the training loop, one by one: average, data order, schedule, gradients over ranks, load-back check."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import build_tiny_sd
from tiny_runs import InMemoryPairs

from mmalign.core import distributed
from mmalign.core.ema import EMA
from mmalign.core.interrupt import StopRequest
from mmalign.data.sampler import BatchSampler
from mmalign.training.export import ExportError, check_load_back
from mmalign.training.loop import Loop
from mmalign.training.method_learner import MethodLearner
from mmalign.training.optim import average_gradients, learning_rate_factor, warmup_steps
from mmalign.training.tasks.image import ImageProbe
from mmalign.training.tracking import MetricBuffer
from pipelines import load_generator


def test_ema_by_hand_and_swap_is_undone() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    ema = EMA({"w": parameter}, 0.5)
    expected, value = 0.0, 0.0
    for updates in range(4):
        value += 1.0
        parameter.data.fill_(value)
        ema.update()
        decay = min(0.5, (1 + updates) / (10 + updates))
        expected = decay * expected + (1 - decay) * value
    assert ema.shadow["w"].item() == pytest.approx(expected)
    with pytest.raises(KeyError), ema.applied():
        assert parameter.item() == pytest.approx(expected)
        raise KeyError
    assert parameter.item() == 4.0


def test_load_back_check_finds_an_export_that_differs(tmp_path: Path) -> None:
    model = build_tiny_sd(tmp_path / "sd")
    generator = load_generator(model, device="cpu")
    cond = generator.encode_prompts(["a red circle"])
    probe = ImageProbe(torch.randn(1, *generator.latent_shape), torch.tensor([500]), cond)
    expected = probe.predict(generator)

    def load(path: str) -> Any:
        return load_generator(path, device="cpu")

    check_load_back(Path(model), load, probe, expected)
    for wrong in (expected + 0.01, expected * float("nan")):
        with pytest.raises(ExportError, match="read again"):
            check_load_back(Path(model), load, probe, wrong)


def test_every_pair_is_sampled_once_an_epoch_to_one_rank_in_any_split() -> None:
    pairs = InMemoryPairs(26)

    def dealt(step: int, **split: int) -> list[str]:
        world_size = split.get("world_size", 1)
        feeds = [BatchSampler(pairs, **{**split, "rank": rank}) for rank in range(world_size)]  # type: ignore[arg-type]
        return [pair for feed in feeds for batch in feed.micro_batches(step) for pair in batch.ids]

    splits = [
        {"batch_size": 8},
        {"batch_size": 2, "accumulation": 4},
        {"batch_size": 2, "accumulation": 2, "world_size": 2},
    ]
    for step in range(7):
        assert len({tuple(sorted(dealt(step, **split))) for split in splits}) == 1
    epochs = [[pair for step in range(3 * e, 3 * e + 3) for pair in dealt(step, batch_size=8)] for e in range(2)]
    assert all(len(set(epoch)) == 24 for epoch in epochs) and epochs[0] != epochs[1]
    assert next(BatchSampler(pairs, batch_size=8).micro_batches(4)).epoch == 1


def test_learning_rate_by_hand() -> None:
    assert [learning_rate_factor(step, 8, 2, "constant") for step in (0, 1, 2, 7)] == [0.5, 1, 1, 1]
    assert [learning_rate_factor(step, 8, 0.25, "linear") for step in (2, 5, 7)] == [1, 0.5, pytest.approx(1 / 6)]
    assert learning_rate_factor(4, 8, 0, "cosine") == pytest.approx(0.5)
    assert learning_rate_factor(0, 8, 0, "constant") == 1
    assert warmup_steps(0.1, 400) == 40 and warmup_steps(25, 400) == 25 and warmup_steps(0, 400) == 0


def test_gradients_are_averaged_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two ranks of which the other holds the same message times three; a parameter without a gradient counts as zero.
    first, second = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    first.grad = torch.tensor([2.0, 4.0])
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flat: flat.mul_(4))
    average_gradients([first, second], world_size=2)
    assert first.grad.tolist() == [4.0, 8.0]
    assert second.grad is not None and second.grad.tolist() == [0.0, 0.0]


def test_a_step_without_a_gradient_is_one_of_zeros_on_one_rank_too() -> None:
    first, second = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    average_gradients([first, second], world_size=1)
    assert first.grad is not None and first.grad.tolist() == [0.0, 0.0] and second.grad is not None
    first.grad, second.grad = torch.tensor([2.0, 4.0]), None
    average_gradients([first, second], world_size=1)
    assert first.grad.tolist() == [2.0, 4.0] and second.grad is None


def test_a_metric_that_only_some_processes_have_is_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process whose part of a step held no sample has only the norm of its gradient, and says so."""

    def gather(mine: dict[str, float]) -> list[dict[str, float]]:
        return [mine, {"loss": 3.0, "accuracy": 0.5, "grad_norm": 1.0}, {"loss": 5.0, "grad_norm": 1.0}]

    monkeypatch.setattr(distributed, "gather", gather)
    learner = object.__new__(MethodLearner)
    monkeypatch.setattr(learner, "accelerator", SimpleNamespace(device="cpu", scaler=None), raising=False)
    monkeypatch.setattr(learner, "optimizer", SimpleNamespace(param_groups=[{"lr": 0.1}]), raising=False)
    monkeypatch.setattr(learner, "_buffer", MetricBuffer(), raising=False)
    monkeypatch.setattr(learner, "epoch", lambda step: 0.0)
    monkeypatch.setattr(learner, "count", lambda: {"seconds": 2.0})
    learner._buffer.add(1, {"grad_norm": 1.0})
    found = learner.metrics(1)
    assert found == {
        "grad_norm": 1.0,
        "loss": 4.0,
        "accuracy": 0.5,
        "learning_rate": 0.1,
        "epoch": 0.0,
        "seconds": 2.0,
    }


def test_processes_agree_to_stop_at_the_end_of_a_round_though_no_line_is_due_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rounds of 3 steps and a line every 4: all are asked once since each line, at the same steps everywhere."""
    asked = []

    def gather(mine: bool) -> list[bool]:
        asked.append(loop.step)
        return [mine, loop.step >= 9]

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather", gather)
    config = SimpleNamespace(output="out", trainer=SimpleNamespace(log_every=4))
    loop = Loop(None, config)  # type: ignore[arg-type]
    stopped = []
    for loop.step in range(3, 16, 3):
        stopped.append(loop._agree_to_stop(StopRequest()))
    assert asked == [6, 9, 12] and stopped == [False, False, True, True, False]
