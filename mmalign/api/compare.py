"""Compare models from Python: systems by name, prompts as a list; and the outcome, as a table that shows itself."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmalign.api import html
from mmalign.api.objects import plain, write_prompts
from mmalign.compare.config import is_comparison, name_models
from mmalign.core.errors import UserError


@dataclass(frozen=True)
class ComparisonResult:
    """What a comparison found. `results` is the content of results.json, `report` the path of report.html.

    `table` and `verdicts` have the intervals and, corrected for the number of held-out comparisons, p-values;
    `scope` says whether the intervals are for one training or for several.
    """

    results: dict[str, Any]
    report: Path

    @property
    def table(self) -> list[dict[str, str]]:
        """The summary as rows of text: a reward and a system each, with mean, difference, "p (Holm)" and win rate."""
        from mmalign.compare.report.tables import flat_rows, summary, summary_head

        blocks = summary(self.results)
        measure = "reward" if self.results.get("item", "prompt") == "prompt" else "measure"
        head = summary_head(measure, self.results["baseline"], blocks)
        return [dict(zip(head, row, strict=True)) for row in flat_rows(blocks)]

    @property
    def verdicts(self) -> list[str]:
        """What held-out rewards say of each system against the baseline and its control, a sentence each."""
        return [one["sentence"] for each in self.results["verdicts"].values() for one in each.values()]

    @property
    def scope(self) -> str:
        """What the intervals are for: these models on other prompts, or other trainings too."""
        return str(self.results["scope"])

    def _repr_html_(self) -> str:
        rows = self.table
        summary = html.table(list(rows[0]), [list(row.values()) for row in rows])
        verdicts = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in self.verdicts)
        scope, report = html.escape(self.scope), html.escape(self.report)
        return f"<div>{summary}<p>{scope}</p><ul>{verdicts}</ul><div>report: {report}</div></div>"


def compare(
    systems: Any,
    *overrides: str,
    prompts: Sequence[str] | str | os.PathLike[str] | None = None,
    rewards: Any = None,
    output: str | os.PathLike[str] | None = None,
    train: bool = True,
    retrain: bool = False,
    **config: Any,
) -> ComparisonResult:
    """Compare models on the same prompts and seeds, with paired intervals and a report, like `mmalign compare`.

    ```python
    outcome = mmalign.compare(
        {"base": "assets/shapes-sd", "dpo": result},
        prompts=["a red circle", "two green stars"],
        rewards=["shapes-correctness"],
        output="runs/compare",
        steps=20,
    )
    outcome.table, outcome.verdicts, outcome.report
    ```

    Args:
        systems: name -> model (a directory, a folder of images, a hub id, a `TrainResult`, or a mapping as
            `systems:` of a config takes it); a list of models; or a whole config: a YAML file, a shipped name, or its
            values. The first system is the baseline unless `baseline` names another.
        overrides: `key.path=value`, as on the command line; applied last.
        prompts: test prompts: texts, or the name of a set or file. Models that answer take `questions` instead.
        rewards: names, classes, or mappings with `name`, `label` and `options`, which score every image.
        output: folder for report.html, results.json and the images; the same call again draws only what is missing.
        train: whether systems that the config trains may be trained. retrain: train anew what a config changed.
        config: the other keys of a comparison: seeds, steps, guidance, limit, diversity, guidance_control, ...

    Raises:
        UserError, PipelineError, RewardError: a system, reward or prompt set is not what it is taken for.
    """
    from mmalign.compare.run import compare as compare_images
    from mmalign.compare.vlm.config import QuestionConfig, load_comparison
    from mmalign.compare.vlm.run import compare_questions

    base, layer = _read_systems(systems)
    layer |= plain(config, "the arguments")
    if rewards is not None:
        listed = rewards.split(",") if isinstance(rewards, str) else rewards
        listed = listed if isinstance(listed, list | tuple) else [listed]
        layer["rewards"] = plain(
            [
                {"name": one, "label": getattr(one, "name", one.__name__)} if isinstance(one, type) else one
                for one in listed
            ],
            "rewards",
        )
    if output is not None:
        layer["output"] = os.fspath(output)
    texts = None if prompts is None or isinstance(prompts, str | os.PathLike) else list(prompts)
    if texts is not None:
        layer["prompts"] = "<prompts>"
    elif prompts is not None:
        layer["prompts"] = os.fspath(prompts)  # type: ignore[arg-type]
    checked = load_comparison(base, overrides, layer)
    if texts is not None:
        checked = load_comparison(base, overrides, layer | {"prompts": write_prompts(texts, Path(checked.output))})
    options = {"train": train, "retrain": retrain}
    if isinstance(checked, QuestionConfig):
        outcome = compare_questions(checked, **options)
    else:
        outcome = compare_images(checked, **options)
    return ComparisonResult(outcome.results, outcome.report)


def _read_systems(systems: Any) -> tuple[str | Path | Mapping[str, Any], dict[str, Any]]:
    """Return a config to start from, and the systems that were given one by one as a layer over it."""
    from mmalign.compare.images.made import as_system

    if isinstance(systems, str | Path):
        if is_comparison(str(systems)):
            return systems, {}
        raise UserError(f"systems: '{systems}' is no config of a comparison; give name -> model, or a list of models")
    if isinstance(systems, Mapping) and "systems" in systems:
        values: Mapping[str, Any] = plain(systems, "the config")
        return values, {}
    if isinstance(systems, Mapping):
        named = [(str(name), plain(one, f"systems: {name}")) for name, one in systems.items()]
    else:
        models = [plain(one, "systems") for one in systems]
        named = list(zip(name_models(models), models, strict=True))
    listed = [{"name": name, **one} if isinstance(one, dict) else as_system(name, one) for name, one in named]
    return {}, {"systems": listed}
