"""The examples of the guides, run as they stand; the table of rewards, compared with the registry."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from tiny_models import build_tiny_sd

from mmalign.cli import main
from mmalign.compare.config import load_compare_config
from mmalign.compare.systems.training import plan_trainings
from mmalign.core.io.video_files import write_video
from mmalign.data.building.captions import edits_of
from mmalign.data.video.items import load_video_questions
from rewards import load_reward

ROOT = Path(__file__).parent.parent
GUIDES = ROOT / "docs" / "guides"
MODULES = ("my_methods", "my_online", "my_rewards", "my_sampler", "my_lamps", "my_captions")


def example(name: str, guide: str) -> str:
    code = re.search(rf"<!-- example: {name} -->\n+```python\n(.*?)```", (GUIDES / guide).read_text(), re.S)
    assert code is not None
    return code.group(1)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in MODULES:  # another test may have made a module of that name
        sys.modules.pop(name, None)
    yield tmp_path
    for name in MODULES:
        sys.modules.pop(name, None)


def test_the_comparison_that_trains_is_one_that_compare_takes(folder: Path) -> None:
    text = re.search(r"```yaml\n(# mmalign compare versus.yaml\n.*?)```", (GUIDES / "compare.md").read_text(), re.S)
    assert text is not None
    (folder / "versus.yaml").write_text(text.group(1))
    config = load_compare_config("versus.yaml")
    trainings = {one.systems[0]: one.config for one in plan_trainings(config)}
    assert {name: (one.method_name, one.output) for name, one in trainings.items()} == {
        "sft": ("sft", "runs/versus/sft"), "dpo": ("diffusion_dpo", "runs/versus/dpo")
    }  # fmt: skip
    assert all(one.trainer.budget and one.trainer.budget.images == 20000 for one in trainings.values())


def test_the_method_trains(folder: Path) -> None:
    code = example("method", "add-a-method.md")
    assert len(code.splitlines()) < 60
    (folder / "my_methods.py").write_text(code)
    model = build_tiny_sd(folder / "model")
    for side in ("chosen", "rejected"):
        (folder / "pairs" / side).mkdir(parents=True)
    from PIL import Image

    for number in range(4):
        for side, shade in (("chosen", 200), ("rejected", 60)):
            Image.new("RGB", (16, 16), (shade, 10 * number, 30)).save(folder / "pairs" / side / f"{number}.png")
        (folder / "pairs" / "chosen" / f"{number}.txt").write_text("a red square")
    code_out = main(
        ["train", "shapes/diffusion_dpo", "method={name: 'my_methods:Margin', margin: 0.02}", f"model={model}",
         "data.pairs=pairs", f"data.cache={folder / 'cache'}", "trainer.steps=2", "trainer.batch_size=2",
         "trainer.precision=fp32", "trainer.log_every=1", "evaluate=null", "output=run"]
    )  # fmt: skip
    assert code_out == 0
    assert '"gap"' in (folder / "run" / "metrics.jsonl").read_text()


def test_the_online_method_trains(folder: Path) -> None:
    (folder / "my_online.py").write_text(example("reinforce", "add-a-method.md"))
    (folder / "prompts.txt").write_text("a red square\na blue star\n")
    model = build_tiny_sd(folder / "model", vae="tiny")
    code_out = main(
        ["train", "shapes/ddpo", "method={name: 'my_online:Reinforce', sampling_steps: 2, guidance: 1.0}",
         f"model={model}", "data.prompts=prompts.txt", f"data.cache={folder / 'cache'}", "trainer.steps=2",
         "trainer.batch_size=2", "trainer.precision=fp32", "trainer.log_every=1", "evaluate=null", "output=run",
         "rewards=[jpeg-compressibility]"]
    )  # fmt: skip
    assert code_out == 0
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["log_ratio_max"] == 0 and lines[1]["kl"] > 0


def test_the_kernels_of_the_guide_sample(folder: Path) -> None:
    left: dict[str, Any] = {}
    exec(example("kernels", "samplers.md"), left)
    assert left["log_probs"].shape == (8, 2) and left["images"].shape == (2, 3, 64, 64)
    same = left["mixed"].latents - left["drawn"].latents
    assert same.abs().max() > 0.01  # other noise, other images
    assert torch.isfinite(left["by_name"].latents).all() and torch.isfinite(left["start"].latents).all()


def test_the_method_with_its_own_kernel_trains(folder: Path) -> None:
    (folder / "my_sampler.py").write_text(example("cps", "samplers.md"))
    (folder / "prompts.txt").write_text("a red square\na blue star\n")
    model = build_tiny_sd(folder / "model", vae="tiny")
    code = main(
        ["train", "shapes/ddpo", "method={name: 'my_sampler:CpsDDPO', sampling_steps: 3, guidance: 1.0}",
         f"model={model}", "data.prompts=prompts.txt", f"data.cache={folder / 'cache'}", "trainer.steps=1",
         "trainer.batch_size=2", "trainer.precision=fp32", "evaluate=null", "output=run",
         "rewards=[jpeg-compressibility]"]
    )  # fmt: skip
    assert code == 0
    [line] = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert line["log_ratio_max"] == 0 and line["grad_norm"] >= 0


def test_the_question_set_and_the_captions_join(folder: Path) -> None:
    guide = "add-a-question-set.md"
    (folder / "my_lamps.py").write_text(example("question set", guide))
    (folder / "my_captions.py").write_text(example("captions", guide))
    info = folder / "site" / "lamps-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lamps\nVersion: 1.0\n")
    points = re.findall(r"```toml\n(.*?)```", (GUIDES / guide).read_text(), re.S)
    assert len(points) == 2
    (info / "entry_points.txt").write_text("".join(points).replace('"', "").replace("project.entry-points.", ""))
    sys.path.insert(0, str(folder / "site"))  # the fixture's patch of sys.path takes it away again
    lamps = {"up": [0, 120, 250], "down": [250, 120, 0]}
    for name, levels in lamps.items():
        frames = torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(3, 3, 16, 16)
        write_video(folder / "set" / f"{name}.mkv", frames)
    (folder / "set" / "lamps.json").write_text(json.dumps(lamps))
    items = load_video_questions(str(folder / "set"))
    assert [(item.id, item.answer) for item in items] == [
        ("up/brighter", "yes"), ("up/darker", "no"), ("down/brighter", "no"), ("down/darker", "yes")
    ]  # fmt: skip
    perturb = ["--operators", "reverse", "--chosen", "truth", "--rejected", "videos", "--out", "pairs.parquet"]
    assert main(["pairs", "perturb", "set", *perturb]) == 0
    assert [row["chosen"] for row in pq.read_table("pairs.parquet").to_pylist()] == [item.answer for item in items]
    assert edits_of("counts")[0]("a red ring") == {"number": ["no red ring"]}


def test_the_reward_scores(folder: Path) -> None:
    (folder / "my_rewards.py").write_text(example("reward", "add-a-reward.md"))
    red = torch.zeros(1, 3, 8, 8)
    red[:, 0] = 0.5
    assert load_reward("my_rewards:Warmth")(red).item() == pytest.approx(0.5)


def test_the_reward_with_facts_and_options(folder: Path) -> None:
    from rewards import RewardError

    (folder / "my_rewards.py").write_text(example("contrast", "add-a-reward.md"))
    name = "my_rewards:ContrastRms"
    halves = torch.zeros(1, 3, 4, 4)
    halves[..., :2] = 0.8
    plain = torch.full((1, 3, 4, 4), 0.3)
    reward = load_reward(name, device="cpu")
    assert reward(torch.cat([halves, plain])).tolist() == pytest.approx([0.4, 0.0], abs=1e-6)
    assert load_reward(name, gamma=2.0)(halves).item() == pytest.approx(0.32)  # 0.64 and 0
    media = (halves * 0.5 + 0.1).requires_grad_()
    reward(media).sum().backward()
    assert media.grad is not None and media.grad.abs().max() > 0
    with pytest.raises(RewardError, match="gamma is 4; 1 to 3 are allowed"):
        load_reward(name, gamma=4)
    from PIL import Image

    Image.new("RGB", (4, 4), (255, 255, 255)).save("white.png")
    assert main(["score", "white.png", "--rewards", name, "--out", "s.csv"]) == 0
    assert "gamma 1" in (folder / "s.csv.meta.json").read_text()


def test_the_table_of_rewards_agrees_with_the_registry() -> None:
    from rewards import Facts, reward_class
    from rewards.registry import BUILTIN

    text = (ROOT / "rewards" / "README.md").read_text()
    section = text.partition("[start:table] -->")[2].partition("<!-- --8<-- [end:table]")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:2] == "| "]
    header, *rows = rows
    assert header == ["reward", "licence", "range", "measures", "limitations"]
    assert sorted(row[0].strip("`") for row in rows) == [row[0].strip("`") for row in rows] == sorted(BUILTIN)
    for name, licence, limits, measures, limitations in rows:
        facts = Facts.of(reward_class(name.strip("`")))
        assert (licence, limits) == (facts.licence, " .. ".join(f"{bound:g}" for bound in facts.range)), name
        assert (facts.modality == "video") == measures.startswith("video") and limitations
