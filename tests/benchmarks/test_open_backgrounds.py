"""The entropy of backgrounds that captions leave open: by hand, and read from a comparison's drawings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.open_backgrounds import entropy, main, of_comparison, spread
from mmalign.shapes.world import BACKGROUNDS


def test_entropy_by_hand() -> None:
    assert entropy(np.array([2.0, 2.0, 0.0])) == 1.0
    assert entropy(np.array([4.0, 0.0])) == 0.0
    assert entropy(np.array([1.0, 1.0, 2.0])) == pytest.approx(1.5)


def test_spread_counts_images_and_resamples_prompts() -> None:
    found = spread([["navy", "navy"], ["navy", "gray"]] * 20)
    assert found.bits == pytest.approx(-0.75 * np.log2(0.75) - 0.25 * np.log2(0.25))
    assert (found.images, found.favourite, found.share) == (80, "navy", 0.75)
    assert found.low < found.bits < found.high < 1


def test_prompts_that_name_a_background_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["a red circle", "a red circle on a black background", "a green square"]
    lines = ["index,prompt,category,seed,system,reward,score"]
    for index, prompt in enumerate(prompts):
        for seed, name in enumerate(("navy", "black")):
            (tmp_path / "images" / "base").mkdir(parents=True, exist_ok=True)
            picture = np.full((64, 64, 3), BACKGROUNDS[name], np.uint8)
            Image.fromarray(picture).save(tmp_path / "images" / "base" / f"{index:04d}-{seed}.png")
            lines += [f"{index},{prompt},x,{seed},base,{reward},0.5" for reward in ("one", "other")]
    (tmp_path / "scores.csv").write_text("\n".join(lines) + "\n")
    assert of_comparison(tmp_path)["base"].images == 4
    assert main([str(tmp_path)]) == 0
    assert "base             1.00 bits [1.00, 1.00] over 4 images" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "images")])
