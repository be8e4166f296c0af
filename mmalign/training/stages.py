"""Training in stages: one difficulty of pairs after another, each from the model of the stage before.

The adapter is merged between two stages, so the reference of a stage is its starting model (TEMPLE, arXiv 2503.16929).
Finished stages are kept: the same call again resumes the interrupted stage.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.config.run import dump_config
from mmalign.core.files import write_atomically
from mmalign.core.progress import note
from mmalign.training.chain import check_chain, train_once
from mmalign.training.models import whole_model
from mmalign.training.output import CONFIG_FILE
from mmalign.training.plan import check_enough
from mmalign.training.recipe import build_method, set_aside
from mmalign.training.tasks import task_of

if TYPE_CHECKING:
    from mmalign.config.run import RunConfig

FOLDER = "stages"


def train_in_stages(config: RunConfig, resume: str = "auto") -> Path:
    """Train `trainer.steps` steps on each difficulty and return the folder of the last model, `config.output`.

    Earlier stages lie in `stages/DIFFICULTY` within it, each with its merged model, which the next one names as its
    base; `stages/config.yaml`, written last, is the whole recipe. `resume` is "auto" or "never".

    Raises:
        UserError: the configuration cannot work, a stage has too few pairs; and the errors of a training.
    """
    check_chain(resume, "stages", "are merged")
    method, output = build_method(config), Path(config.output)
    limit = config.data.limit  # of each stage's pairs, not of all together
    whole = config.model_copy(update={"data": config.data.model_copy(update={"limit": None})})
    source: Any = task_of(config).open_source(whole, method)
    method.check_data(source)
    for difficulty, count in Counter(source.difficulties()).items():
        check_enough(min(count, limit or count), config, 1, f"pairs of difficulty {difficulty}")
    if resume == "never":
        set_aside(output / FOLDER)
    model = config.model
    for number, difficulty in enumerate(method.stages, start=1):
        note(f"── stage {number} of {len(method.stages)}: difficulty {difficulty}, from {model}")
        folder, last = output / FOLDER / str(difficulty), number == len(method.stages)
        changes = {"method": {**config.method, "stages": [difficulty]}, "model": model}
        one = config.model_copy(update={**changes, "output": str(output if last else folder / "model")})
        trained = train_once(one, resume if last else "auto")
        if not last:
            model = str(whole_model(one, trained, folder / "merged"))
    write_atomically(output / FOLDER / CONFIG_FILE, dump_config(config))
    return output
