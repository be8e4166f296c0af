"""The report and the verdict from made-up scores: what is said, what is escaped, what is drawn where."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmalign.compare.report.charts import Axis, bar_mark, line_chart, thin_out
from mmalign.compare.report.console import print_summary
from mmalign.compare.report.costs import cost_curves, own_curves
from mmalign.compare.report.page import safe_json, write_report
from mmalign.compare.report.tables import as_latex, as_markdown, config_differences, summary
from mmalign.compare.report.thumbnails import choose_prompts, embed
from mmalign.compare.results.comparison import Comparison
from mmalign.compare.results.numbers import decimals, signed
from mmalign.compare.results.results import build_results, write_results
from mmalign.compare.scores import RewardFacts
from mmalign.compare.systems.facts import SystemFacts
from mmalign.data.prompts import Prompt

EVIL = "</script><script>alert(1)</script> & 'a' \"b\" {{ 7 * 7 }}"


def facts(label: str, higher: bool = True) -> RewardFacts:
    return RewardFacts(label, label, label, "1", f"About {label}.", higher, False, "MIT", "none: computed", "")


def comparison(folder: Path, prompts: int = 8, size: int = 16, control: bool = False) -> Comparison:
    """Two rewards: `seen` was trained on and gains 0.2, `held_out` gains 0.1 where `lower` makes it a loss."""
    rng = np.random.default_rng(0)
    base = rng.normal(0.5, 0.1, (prompts, 2))
    noise = rng.normal(0, 0.01, (prompts, 2))
    systems = {"base": SystemFacts("base", "assets/base", 4.0, "0" * 32)}
    if control:
        systems["base@guidance=6"] = SystemFacts("base@guidance=6", "assets/base", 6.0, "0" * 32, control=True)
    curves = {"loss": [(step, 1 / step) for step in range(1, 9)], "seconds": [(1, 1.0), (2, 2.0)]}
    config = {"method.name": "dpo<b>", "trainer.steps": 8}
    systems["dpo"] = SystemFacts("dpo", f"runs/{EVIL}", 4.0, "1" * 32, ["seen"], config, curves)
    gain = {"base": 0.0, "base@guidance=6": 0.15, "dpo": 0.1}
    scores = {
        label: {name: base + scale * gain[name] + (name != "base") * noise for name in systems}
        for label, scale in (("seen", 2.0), ("held_out", 1.0), ("error", 1.0))
    }
    paths: dict[str, list[list[Path]]] = {}
    for name in systems:
        paths[name] = []
        for index in range(prompts):
            row = [folder / f"{name}-{index}-{seed}.png" for seed in (0, 1)]
            for path in row:
                Image.new("RGB", (size, size), (index * 10, 40, 90)).save(path)
            paths[name].append(row)
    texts = [Prompt(EVIL if index == 0 else f"prompt {index}", "ab"[index % 2]) for index in range(prompts)]
    return Comparison(
        prompts=texts,
        seeds=[0, 1],
        baseline="base",
        systems=systems,
        rewards={"seen": facts("seen"), "held_out": facts("held_out"), "error": facts("error", higher=False)},
        scores=scores,
        image_paths=paths,
        resamples=500,
    )


def render(comparison: Comparison, folder: Path) -> str:
    write_report(comparison, build_results(comparison), "systems: []\n", folder / "report.html")
    return (folder / "report.html").read_text()


class Elements(HTMLParser):
    """Collects (tag, attributes) and the text of JSON blocks; fails on tags that do not close in order."""

    VOID = {"meta", "img", "input", "line", "circle", "rect", "polyline", "br"}

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.json = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script" and self.found[-1][1].get("id") == "data":
            self.json += data


def parse(page: str) -> Elements:
    elements = Elements()
    elements.feed(page)
    elements.close()
    assert elements.open == []
    return elements


def test_the_verdict_rests_on_held_out_rewards_alone(tmp_path: Path) -> None:
    made = comparison(tmp_path)
    verdict = build_results(made)["verdicts"]["dpo"]["versus_baseline"]
    assert (verdict["outcome"], verdict["better"], verdict["worse"]) == ("mixed", ["held_out"], ["error"])
    assert re.match(r"dpo is better than base on held_out \(\+0\.\d+ \[\+0", verdict["sentence"])
    del made.rewards["error"], made.scores["error"]
    assert build_results(made)["verdicts"]["dpo"]["versus_baseline"]["outcome"] == "better"
    del made.rewards["held_out"], made.scores["held_out"]
    verdict = build_results(made)["verdicts"]["dpo"]["versus_baseline"]
    assert verdict["outcome"] == "none" and "trained on every reward" in verdict["sentence"]


def test_a_gain_that_the_control_has_too_is_no_gain_over_the_control(tmp_path: Path) -> None:
    made = comparison(tmp_path, control=True)
    del made.rewards["error"], made.scores["error"]
    verdicts = build_results(made)["verdicts"]["dpo"]
    assert verdicts["versus_baseline"]["outcome"] == "better"
    assert (verdicts["versus_control"]["outcome"], verdicts["versus_control"]["other"]) == ("worse", "base@guidance=6")


def test_a_single_prompt_gives_numbers_without_intervals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = comparison(tmp_path, prompts=1)
    document = build_results(made)
    write_results(document, tmp_path / "results.json")
    read = json.loads((tmp_path / "results.json").read_text())["systems"]["dpo"]["versus_baseline"]["held_out"]
    assert read["ci95"] is None and read["delta"] == pytest.approx(0.1, abs=0.03)
    assert document["verdicts"]["dpo"]["versus_baseline"]["outcome"] == "inconclusive"
    assert "no interval from one prompt" in render(made, tmp_path)
    print_summary(document, tmp_path / "report.html")
    assert "no interval" in capsys.readouterr().out


def test_no_data_becomes_markup(tmp_path: Path) -> None:
    page = render(comparison(tmp_path), tmp_path)
    elements = parse(page)
    assert [attributes.get("id") for tag, attributes in elements.found if tag == "script"] == ["data", None]
    assert "{{ 7 * 7 }}" in page and "49 " not in page
    assert "dpo&lt;b&gt;" in page
    alts = [attributes["alt"] for tag, attributes in elements.found if tag == "img"]
    assert f"base, seed 0: {EVIL}" in alts


def test_the_page_needs_no_network(tmp_path: Path) -> None:
    elements = parse(render(comparison(tmp_path), tmp_path))
    sources = [attributes.get("src") or attributes.get("href") for _, attributes in elements.found]
    assert all(source.startswith("data:") for source in sources if source)
    assert not [tag for tag, _ in elements.found if tag in ("link", "iframe", "object")]


def test_the_script_gets_the_scores_that_the_page_shows(tmp_path: Path) -> None:
    made = comparison(tmp_path)
    data = json.loads(parse(render(made, tmp_path)).json)
    assert data["systems"] == ["base", "dpo"] and [one["higher"] for one in data["rewards"]] == [True, True, False]
    np.testing.assert_allclose(data["rewards"][1]["scores"][1], made.scores["held_out"]["dpo"], atol=1e-6)


def test_json_cannot_end_its_element() -> None:
    text = safe_json({"a": EVIL})
    assert "<" not in text and "&" not in text
    assert json.loads(text) == {"a": EVIL}


def test_sections_without_content_are_left_out(tmp_path: Path) -> None:
    made = comparison(tmp_path)
    page = render(made, tmp_path)
    assert 'id="training"' in page and 'id="categories"' in page and 'id="control"' not in page
    made.prompts = [Prompt(prompt.text) for prompt in made.prompts]
    made.systems["dpo"] = SystemFacts("dpo", "runs/dpo", 4.0, "1" * 32)
    page = render(made, tmp_path)
    assert 'id="training"' not in page and 'id="categories"' not in page


def test_all_but_a_category_are_shown_beside_it(tmp_path: Path) -> None:
    made = comparison(tmp_path)
    made.prompts = [Prompt(prompt.text, "abc"[index % 3]) for index, prompt in enumerate(made.prompts)]
    made.category_apart = "b"
    document = build_results(made)
    assert document["categories"] == {"a": 3, "b": 3, "c": 2, "all but b": 5}
    rows = [0, 2, 3, 5, 6]
    gap = made.scores["held_out"]["dpo"][rows] - made.scores["held_out"]["base"][rows]
    found = document["systems"]["dpo"]["versus_baseline"]["held_out"]["by_category"]["all but b"]
    assert found["delta"] == pytest.approx(gap.mean()) and found["delta_ci95"][0] < gap.mean() < found["delta_ci95"][1]
    page = render(made, tmp_path)
    assert "all but b <small>5 prompts</small>" in page and "<option>b</option>" in page
    assert "<option>all but b</option>" not in page and "3 categories" in page


def test_large_images_become_thumbnails_and_the_page_says_so(tmp_path: Path) -> None:
    Image.new("RGB", (512, 256)).save(tmp_path / "large.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "small.png")
    large, small = embed(tmp_path / "large.png"), embed(tmp_path / "small.png")
    assert large.shrunk and not large.pixelated and not large.uri.startswith("data:image/png")
    assert not small.shrunk and small.pixelated and small.uri.startswith("data:image/png;base64,")
    assert "shown as thumbnails" in render(comparison(tmp_path, prompts=2, size=300), tmp_path)


def test_too_many_prompts_are_thinned_evenly() -> None:
    assert choose_prompts(5, 4, most=20) == [0, 1, 2, 3, 4]
    assert choose_prompts(100, 4, most=12) == [0, 50, 99]
    assert len(set(choose_prompts(1632, 8))) == 300


def test_config_differences_show_what_differs(tmp_path: Path) -> None:
    made = comparison(tmp_path)
    assert [row["key"] for row in config_differences(made)["rows"]] == ["method.name", "trainer.steps"]
    made.systems["sft"] = SystemFacts(
        "sft", "m", 4.0, "2" * 32, [], {"method.name": "sft", "trainer.steps": 8, "x": 1}
    )
    found = config_differences(made)
    assert found["rows"] == [{"key": "method.name", "cells": ["dpo<b>", "sft"]}, {"key": "x", "cells": ["–", "1"]}]
    assert found["equal"] == 1


def test_tables_to_paste(tmp_path: Path) -> None:
    made = comparison(tmp_path)
    blocks = summary(build_results(made))
    markdown, latex = as_markdown(made, blocks), as_latex(made, blocks)
    assert sum(line.startswith("| held_out | dpo |") for line in markdown.splitlines()) == 1
    assert "| seen | dpo † |" in markdown
    assert r"held\_out & base" in latex and r"dpo $^\dagger$" in latex and latex.count(r"\midrule") == 3


def trained(name: str, calls: int, evaluations: int = 3, limit: int = 8, **more: Any) -> SystemFacts:
    """A system of 100 images seen and `calls` reward calls between two evaluations, "seen" rising by 0.1."""
    costs = [
        {"images_seen": 100.0 * i, "images_sampled": 0.0, "reward_calls": 1.0 * calls * i, "seconds": 2.0 * i}
        for i in range(evaluations)
    ]
    seen = [{**cost, "evaluation/seen": 0.5 + 0.1 * i} for i, cost in enumerate(costs)]
    config = {"method.name": name, "evaluate.limit": limit}
    steps = list(range(evaluations))
    return SystemFacts(
        name, f"runs/{name}", 4.0, "3" * 32, ["seen"], config, {}, seen, costs[-1], evaluation_steps=steps, **more
    )


def test_held_out_rewards_are_drawn_against_each_cost(tmp_path: Path) -> None:
    made = comparison(tmp_path)
    assert cost_curves(made) is None and 'id="costs"' not in render(made, tmp_path)
    made.systems |= {"prdp": trained("prdp", 7), "sft": trained("sft", 0, evaluations=5)}
    made.systems["half"] = trained("half", 7, adapter_scale=0.5)
    found = cost_curves(made)
    assert [panel["title"] for panel in found["panels"]] == ["images seen", "reward calls", "seconds"]
    by_images, by_calls, _ = (panel["charts"][0] for panel in found["panels"])
    assert (by_images["label"], by_images["trained_on"], by_images["without"]) == ("seen", ["prdp", "sft"], [])
    prdp, sft = (line["points"] for line in by_images["chart"]["lines"])
    assert len(prdp) == 3 and len(sft) == 5
    # Both rise by the same from evaluation to evaluation at the same cost, so one lies on the other.
    np.testing.assert_allclose(prdp, sft[:3])
    assert [line["name"] for line in by_calls["chart"]["lines"]] == ["prdp"] and by_calls["without"] == ["sft"]
    assert found["systems"] == ["prdp", "sft"]
    assert found["notes"] == [
        "Left out: half, whose evaluations used another adapter scale.",
        "Left out: dpo, whose training logged no cost with its evaluations.",
    ]
    made.systems["sft"] = trained("sft", 0, limit=16)
    assert cost_curves(made)["notes"][-1].startswith("The evaluations differ in evaluate.limit, so")


def online(name: str, drawn: int, *rewards: str) -> SystemFacts:
    """A training with lines at steps 4, 8 and 12 of `drawn` images each, whose rewards rise by 0.1 a line."""
    lines = {"images_sampled": drawn, "images_seen": 3 * drawn, "seconds": 2.0}
    curves = {metric: [(4 * i, each * i) for i in (1, 2, 3)] for metric, each in lines.items()}
    curves |= {f"reward/{reward}": [(4 * i, 0.4 + 0.1 * i) for i in (1, 2, 3)] for reward in rewards}
    return SystemFacts(name, f"runs/{name}", 4.0, "4" * 32, ["seen"], {"method.name": name}, curves)


def test_rewards_of_own_samples_are_drawn_against_images_and_seconds(tmp_path: Path) -> None:
    made = comparison(tmp_path)
    assert own_curves(made) is None and 'id="own-rewards"' not in render(made, tmp_path)
    made.systems |= {"nft": online("nft", 128, "seen", "held_out"), "align": online("align", 64, "seen")}
    made.systems["uncounted"] = SystemFacts(
        "uncounted", "runs/u", 4.0, "5" * 32, curves={"reward/seen": [(1, 0.0)] * 2}
    )
    found = own_curves(made)
    assert [panel["title"] for panel in found["panels"]] == ["images drawn", "seconds", "images seen"]
    assert found["systems"] == ["nft", "align"]
    seen, held_out = found["panels"][0]["charts"]
    assert (seen["label"], seen["trained_on"], held_out["without"]) == ("seen", ["nft", "align"], ["align"])
    nft, align = (line["points"] for line in seen["chart"]["lines"])
    # The same rewards at half the images: points 2 of `align` lie above points 1 of `nft`, at 128 images.
    assert nft[0][0] == align[1][0] and [y for _, y in nft] == [y for _, y in align]
    shown = comparison(tmp_path)
    shown.systems["dpo"] = online("dpo", 64, "seen")
    page = render(shown, tmp_path)
    parse(page)
    assert 'data-switch="own-panel"' in page and page.count('<div class="own-panel"') == 3
    assert "reward/seen by training step" not in page  # where the costs of the methods would not compare


def test_cost_and_adapter_scale_are_shown_and_kept(tmp_path: Path) -> None:
    made = comparison(tmp_path)
    facts = trained("dpo", 1500, adapter_scale=0.5)
    made.systems["dpo"] = facts
    made.settings = {"budget": {"images": 12000}, "steps": 4, "guidance": 4.0, "solver": "ddim", "precision": "fp32"}
    systems = build_results(made)["systems"]
    assert systems["dpo"]["cost"] == {"images_seen": 200, "images_sampled": 0, "reward_calls": 3000, "seconds": 4}
    assert systems["dpo"]["adapter_scale"] == 0.5 and "cost" not in systems["base"]
    page = render(made, tmp_path)
    parse(page)
    assert "200 images seen, 3,000 reward calls, 4 seconds" in page
    assert "12,000 images seen by each trained system" in page
    assert "Adapter scale</th>" in page and '<td class="right">0.5</td>' in page
    made.systems["dpo"] = SystemFacts("dpo", "runs/dpo", 4.0, "1" * 32)
    assert "Adapter scale</th>" not in (page := render(made, tmp_path)) and "Cost of training" not in page


def test_ticks_tell_a_scale_and_stay_in_the_picture() -> None:
    for low, high in ((0.755, 0.845), (0.999, 1.001), (-3.0, 4.9), (0.0, 123456.0)):
        axis = Axis.over([low, high])
        assert len(axis.ticks) >= 2 and all(axis.low <= tick <= axis.high for tick in axis.ticks)
    chart = line_chart({"a": [(0, 0.0), (100_000, 1.0)]})
    last = chart["x_ticks"][-1]
    assert (last["text"], last["anchor"], last["at"]) == ("100,000", "end", chart["width"])
    assert chart["x_ticks"][0]["anchor"] == "middle"


def test_axes_and_marks() -> None:
    axis = Axis.over([0.0, 1.0], bars=True, padding=0.0)
    assert (axis.low, axis.percent(0.25)) == (0.0, 25.0)
    assert [tick["text"] for tick in axis.labels()] == ["0.0", "0.5", "1.0"]
    assert bar_mark(Axis(-1.0, 1.0, (), 0), -0.5) == {"start": 25.0, "width": 25.0, "end": 25.0}
    flat = Axis.over([3.0, 3.0])
    assert flat.low < 3.0 < flat.high
    chart = line_chart({"a": [(0, 0.0), (10, 1.0)]})
    (x0, y0), (x1, y1) = chart["lines"][0]["points"]
    assert x0 < x1 and y0 > y1  # y of SVG grows downwards
    assert thin_out([(float(i), 1.0) for i in range(1000)], most=10)[0] == (49.5, 1.0)


def test_numbers_are_written_to_what_their_interval_supports() -> None:
    assert decimals(0.1234, (0.10, 0.15)) == 3
    assert decimals(12.3, (5.0, 20.0)) == 0
    assert (signed(0.1234, 2), signed(-0.1, 2), signed(-0.001, 2)) == ("+0.12", "−0.10", "0.00")
