"""Write the report: one self-contained HTML page that needs no network and no server.

Everything that comes from data (prompts, names, paths, configurations) is escaped by the template engine; the data for
the page's script are JSON without any `<`.
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mmalign.compare.report.costs import cost_curves, describe_cost, own_curves
from mmalign.compare.report.gallery import media_gallery
from mmalign.compare.report.plots import categories, curves, forest, sweep
from mmalign.compare.report.seed_tables import more_tables
from mmalign.compare.report.tables import (
    as_latex,
    as_markdown,
    config_differences,
    describe_intervals,
    has_spread,
    summary,
)
from mmalign.compare.results.comparison import Comparison
from mmalign.compare.results.numbers import describe_delta
from mmalign.core.files import write_atomically

_HERE = Path(__file__).parent
_OUTCOMES = {
    "better": "better",
    "worse": "worse",
    "mixed": "mixed",
    "inconclusive": "no clear difference",
    "none": "no verdict",
}
_COLOURS = 12  # of challengers; report.css numbers them c2 to c13, after the baseline's c0 and the control's c1


def write_report(
    comparison: Comparison,
    document: dict[str, Any],
    config_text: str,
    path: Path,
    gallery: dict[str, Any] | None = None,
) -> None:
    """Render the report of a comparison.

    Args:
        document: the content of results.json (`build_results`).
        config_text: the YAML that repeats the comparison, shown at the end.
        path: the page; written whole or not at all.
        gallery: cards other than images or videos, with the `template` that shows them; None: those of the comparison.
    """
    gallery = gallery or media_gallery(comparison)
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["zip"] = zip
    environment.filters["unbroken"] = unbroken
    environment.filters["describe_cost"] = describe_cost
    scripts = ["report.js", *(["clips.js"] if gallery.get("clips") else [])]
    page = environment.get_template(gallery.get("template", "report.html.j2")).render(
        **page_context(comparison, document, gallery),
        config_text=config_text,
        css=Markup((_HERE / "report.css").read_text(encoding="utf-8")),
        script=Markup("".join((_HERE / name).read_text(encoding="utf-8") for name in scripts)),
    )
    write_atomically(path, page)


def page_context(comparison: Comparison, document: dict[str, Any], gallery: dict[str, Any]) -> dict[str, Any]:
    """Return the variables of the template."""
    blocks = summary(document)
    tables = more_tables(document)
    return {
        "title": _title(comparison),
        "created": _date(comparison.created),
        "comparison": comparison,
        "document": document,
        "colour": _colours(comparison),
        "verdicts": [_verdict(comparison, document, name) for name in comparison.challengers],
        "blocks": blocks,
        "spreads": has_spread(blocks),
        "intervals": describe_intervals(comparison),
        "tables": tables,
        "forest": forest(comparison, document),
        "categories": categories(document),
        "sweep": sweep(comparison),
        "curves": curves(comparison),
        "costs": cost_curves(comparison),
        "own": own_curves(comparison),
        "scaled": any(facts.adapter_scale != 1 for facts in comparison.systems.values()),
        "counted": any(facts.cost for facts in comparison.systems.values()),
        "configs": config_differences(comparison),
        "gallery": gallery,
        "data": safe_json(_script_data(comparison, document, gallery)),
        "markdown": as_markdown(comparison, blocks, tables.values()),
        "latex": as_latex(comparison, blocks, tables.values()),
    }


def safe_json(value: Any) -> Markup:
    """Write JSON that may stand inside a script element: no character in it can end the element or open a tag."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def unbroken(text: str) -> str:
    """Keep intervals on one line: the space inside [low, high] becomes a non-breaking one."""
    return re.sub(r"\[[^\[\]]*\]", lambda match: match.group().replace(" ", "\N{NO-BREAK SPACE}"), text)


def _title(comparison: Comparison) -> str:
    names = comparison.challengers or ([comparison.control] if comparison.control else [])
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"{listed} against {comparison.baseline}"


def _date(created: str) -> str:
    try:
        moment = datetime.fromisoformat(created)
    except ValueError:
        return created
    return f"{moment.day} {moment:%B %Y, %H:%M} UTC"


def _colours(comparison: Comparison) -> dict[str, str]:
    """Return the colour class of each system: grey for the baseline and its control, a hue for each challenger."""
    colours = {name: f"c{2 + index % _COLOURS}" for index, name in enumerate(comparison.challengers)}
    colours[comparison.baseline] = "c0"
    if comparison.control:
        colours[comparison.control] = "c1"
    return colours


def _verdict(comparison: Comparison, document: dict[str, Any], name: str) -> dict[str, Any]:
    versus = document["systems"][name]["versus_baseline"]
    trained = [reward for reward in versus if comparison.is_trained_on(name, reward)]
    verdicts = document["verdicts"][name]
    return {
        "name": name,
        "lines": [{**verdict, "tag": _OUTCOMES[verdict["outcome"]]} for verdict in verdicts.values()],
        "trained": [
            {"reward": reward, "text": describe_delta(versus[reward], document["rewards"][reward]["digits"])}
            for reward in trained
        ],
        "remark": document["systems"][name].get("remark", ""),
    }


def _script_data(comparison: Comparison, document: dict[str, Any], gallery: dict[str, Any]) -> dict[str, Any]:
    """Return the scores for sorting and captions, by reward, system, shown prompt and seed."""
    columns, shown, words = len(comparison.seeds), gallery["shown"], gallery.get("words", {})
    return {
        "systems": list(comparison.systems),
        "baseline": comparison.baseline,
        "item": comparison.item,
        "seeds": comparison.seeds,
        "rewards": [
            {
                "label": label,
                "higher": facts.higher_is_better,
                "neutral": facts.neutral,
                "digits": document["rewards"][label]["digits"],
                **({"words": words[label]} if label in words else {}),
                "scores": [by_system[name][shown, :columns].round(6).tolist() for name in comparison.systems],
            }
            for (label, facts), by_system in zip(comparison.rewards.items(), comparison.scores.values(), strict=True)
        ],
    }
