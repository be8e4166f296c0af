from __future__ import annotations

import pytest
import torch

from pipelines import Conditioning, PipelineError


def make(n: int, *, sdxl: bool = True) -> Conditioning:
    rows = torch.arange(n, dtype=torch.float32)
    embeds = rows[:, None, None].repeat(1, 3, 4)
    if not sdxl:
        return Conditioning(embeds)
    return Conditioning(embeds, rows[:, None].repeat(1, 5), rows[:, None].repeat(1, 6) + 1025)


def ids(cond: Conditioning) -> list[float]:
    assert cond.pooled is not None and cond.time_ids is not None
    assert torch.equal(cond.pooled[:, 0], cond.prompt_embeds[:, 0, 0])
    assert torch.equal(cond.time_ids[:, 0] - 1025, cond.prompt_embeds[:, 0, 0])
    return cond.prompt_embeds[:, 0, 0].tolist()


@pytest.mark.parametrize(
    ("index", "expected"),
    [(2, [2]), (-1, [4]), (slice(1, 3), [1, 2]), ([3, 0, 3], [3, 0, 3]), (torch.tensor([4, 1]), [4, 1])],
)
def test_every_index_gives_a_batch(index: object, expected: list[float]) -> None:
    assert ids(make(5)[index]) == expected


def test_integer_index_past_the_end_is_an_error() -> None:
    with pytest.raises(IndexError):
        make(5)[5]


def test_repeat_interleave_and_cat() -> None:
    assert ids(make(2).repeat_interleave(2)) == [0, 0, 1, 1]
    assert ids(Conditioning.cat([make(2), make(3)])) == [0, 1, 0, 1, 2]


def test_sizes_stay_exact_in_low_precision() -> None:
    low = make(3).to(dtype=torch.bfloat16)
    assert low.prompt_embeds.dtype == low.pooled.dtype == torch.bfloat16
    assert low.time_ids.dtype == torch.float32 and low.time_ids[2, 0] == 1027


def test_tensors_round_trip_leaves_absent_ones_out() -> None:
    plain = make(2, sdxl=False)
    assert set(plain.tensors()) == {"prompt_embeds"}
    assert ids(Conditioning.from_tensors(make(4).tensors())) == [0, 1, 2, 3]


def test_mixed_or_unknown_tensors_are_errors() -> None:
    with pytest.raises(PipelineError, match="same tensors"):
        Conditioning.cat([make(2), make(2, sdxl=False)])
    with pytest.raises(PipelineError, match="allows"):
        Conditioning.from_tensors({"prompt_embeds": torch.zeros(1, 2, 3), "masks": torch.zeros(1)})
    with pytest.raises((PipelineError, TypeError), match="batch"):  # TypeError where the tests check shapes
        Conditioning(torch.zeros(2, 3, 4), torch.zeros(3, 5))
