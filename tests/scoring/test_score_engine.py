"""The engine of `mmalign score`: decoding in threads, ahead of rewards on a GPU and in turn with those on a CPU."""

from __future__ import annotations

import threading
import time
from itertools import islice

import pytest
import torch

from mmalign.core.io.items import Item
from mmalign.scoring import engine
from mmalign.scoring.choice import WeightedReward
from rewards import Reward


def test_decoding_is_in_threads_and_in_order(monkeypatch):
    active, most, lock = 0, 0, threading.Lock()

    def slow(media, *rest):
        nonlocal active, most
        with lock:
            active, most = active + 1, max(most, active + 1)
        time.sleep(0.02 if media[0] % 2 else 0.002)
        with lock:
            active -= 1
        return torch.full((3, 1, 1), media[0], dtype=torch.uint8)

    monkeypatch.setattr(engine, "decode", slow)
    pulled = 0

    def items():
        nonlocal pulled
        for number in range(40):
            pulled += 1
            yield Item(str(number), bytes([number]))

    stream = engine.decode_ahead(items(), "image", 8, 4)
    taken = list(islice(stream, 4))
    assert pulled == 8 + 3
    taken += list(islice(stream, 4))
    assert pulled == 8 + 7
    taken += stream
    assert [item.name for item, _ in taken] == [str(number) for number in range(40)]
    assert [int(decoded[0]) for _, decoded in taken] == list(range(40))
    assert most > 1


@pytest.mark.parametrize("spare", [0, 1])
def test_rewards_on_a_cpu_share_with_decoding_only_the_cores_they_spare(monkeypatch, spare):
    events = []

    def noted(media, *rest):
        events.append("decode")
        return torch.full((3, 1, 1), media[0], dtype=torch.uint8)

    class Noting(Reward):
        def score(self, media, prompts, references):
            events.append("score")
            return media[:, 0].mean((1, 2))

    monkeypatch.setattr(engine, "decode", noted)
    monkeypatch.setattr(engine.os, "cpu_count", lambda: torch.get_num_threads() + spare)
    items = [Item(str(number), bytes([number])) for number in range(10)]
    scored = list(engine.score_items(items, [WeightedReward("r", 1.0, Noting(device="cpu"))], batch_size=4, workers=2))
    assert [one.scores["r"] for one in scored] == pytest.approx([number / 255 for number in range(10)])
    in_turn = ["decode"] * 4 + ["score"] + ["decode"] * 4 + ["score"] + ["decode"] * 2 + ["score"]
    assert (events == in_turn) == (spare == 0)


def test_the_code_of_a_reward_without_a_file_counts_by_what_it_does() -> None:
    from mmalign.scoring.chosen import fingerprint_reward
    from rewards import Reward

    def define(factor: str, lines: str = "") -> Reward:
        source = f"{lines}class Mine(Reward):\n    name = 'mine'\n    def score(self, media, prompts, references):\n"
        space = {"Reward": Reward, "__name__": "cell"}
        exec(compile(f"{source}        return {factor} * media.mean((1, 2, 3))\n", "/no/such/cell.py", "exec"), space)
        return space["Mine"]()

    assert fingerprint_reward(define("2")) == fingerprint_reward(define("2", lines="\n\n"))
    assert fingerprint_reward(define("2")) != fingerprint_reward(define("3"))
