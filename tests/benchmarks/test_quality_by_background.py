"""Quality by background: the oracle is flat where scenes are degraded alike; softness sees blur and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from benchmarks.quality_by_background import drawn_quality, main, scenes, softness, uneven
from mmalign.shapes import oracle
from mmalign.shapes.world import BACKGROUNDS, Quality, render


@pytest.mark.parametrize(
    ("kind", "within"),
    [(Quality(), 0.001), (Quality("blurred", 0.0), 0.08), (Quality("low contrast", 0.0), 0.06)],
    ids=lambda one: getattr(one, "kind", ""),
)
def test_the_oracle_is_flat_in_the_background_of_drawn_scenes(kind: Quality, within: float) -> None:
    found = drawn_quality(scenes(16), kind)
    assert max(found.values()) - min(found.values()) < within


def test_softness_sees_blur_on_every_background_alike_and_not_unevenness() -> None:
    rates: dict[str, list[float]] = {name: [] for name in BACKGROUNDS}
    for one in scenes(8):
        for name in BACKGROUNDS:
            image = render(replace(one, background=name))
            crisp = softness(image, oracle.read(image))
            rough = uneven(image, 4.0, 0)
            blurred = ndimage.gaussian_filter(image.astype(np.float32), (0.8, 0.8, 0), mode="nearest")
            soft = softness(blurred, oracle.read(blurred))
            assert crisp is not None and soft is not None
            assert softness(rough, oracle.read(rough)) == pytest.approx(crisp, abs=0.4)
            assert soft > 1.7 * crisp
            rates[name].append(soft)
    means = [np.mean(held) for held in rates.values()]
    assert max(means) < 1.2 * min(means)


def test_command_reads_the_images_of_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images" / "base").mkdir(parents=True)
    for index, one in enumerate(scenes(3)):
        Image.fromarray(render(replace(one, background="gray"))).save(
            tmp_path / "images" / "base" / f"{index:04d}-0.png"
        )
    assert main([str(tmp_path), "--scenes", "2"]) == 0
    printed = capsys.readouterr().out
    assert "base             gray         3   1.000 1.000 1.000    1.000" in printed
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "images")])
