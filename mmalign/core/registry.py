"""The tables of methods, question sets and languages of captions: names to classes, imported only when asked for."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from mmalign.core.errors import UserError, did_you_mean
from rewards.lookup import Lookup


class Registry(Lookup):
    """`rewards.lookup.Lookup` with the errors of mmalign."""

    def __init__(self, kind: str, builtin: Mapping[str, str], entry_point_group: str | None = None) -> None:
        """Keep the table; nothing is imported."""
        super().__init__(kind, builtin, entry_point_group, UserError, did_you_mean)
        self._registered: dict[str, Any] = {}

    def register(self, target: Any) -> Any:
        """Make a class known under its `name` in this process, for one that no other could import; a decorator too.

        A class that is defined again at the same place, as by running a notebook's cell twice, replaces the earlier.

        Raises:
            UserError: it has no `name`, or another class goes by it.
        """
        name = getattr(target, "name", None)
        if not isinstance(target, type) or not isinstance(name, str) or not name or ":" in name:
            raise UserError(f"{target!r} is no {self.kind}: register a class with an attribute `name`, without ':'")
        held = self._registered.get(name)
        if super().__contains__(name) or (held and not is_redefined(held, target)):
            raise UserError(f"{self.kind} name '{name}' is taken; give {target.__qualname__} a name of its own")
        self._registered[name] = target
        return target

    def name_of(self, target: type) -> str:
        """Return how a configuration names a class: by its name, by its dotted path, or else registered here.

        Raises:
            UserError: see `register`.
        """
        name = getattr(target, "name", "")
        if isinstance(name, str) and name in self and self.get(name) is target:
            return name
        return dotted_path(target) or str(self.register(target).name)

    def names(self) -> list[str]:
        """Return every name that `get` knows, sorted; a dotted path is always understood besides."""
        return sorted({*super().names(), *self._registered})

    def __contains__(self, name: str) -> bool:
        """Tell whether `name` is a known name (a dotted path is not)."""
        return name in self._registered or super().__contains__(name)

    def get(self, name: str, also: Iterable[str] = ()) -> Any:
        """Return what `name` stands for; see `Lookup.get`."""
        if name in self._registered:
            return self._registered[name]
        return super().get(name, {*also, *self._registered})


def dotted_path(target: type) -> str | None:
    """Return "module:Class" if another process finds the class by it, None for one of a notebook or a function."""
    found = sys.modules.get(target.__module__)
    if target.__module__ == "__main__" or getattr(found, target.__qualname__, None) is not target:
        return None
    return f"{target.__module__}:{target.__qualname__}"


def is_redefined(old: type, new: type) -> bool:
    """Tell whether `new` is what the definition of `old` has become, as after a notebook's cell has run again."""
    return (old.__module__, old.__qualname__) == (new.__module__, new.__qualname__)


methods = Registry(
    "method",
    {
        "align_prop": "mmalign.methods.align_prop:AlignProp",
        "capo": "mmalign.methods.capo:CaPO",
        "ddpo": "mmalign.methods.ddpo:DDPO",
        "dense_dpo": "mmalign.methods.dense_dpo:DenseDPO",
        "diffusion_dpo": "mmalign.methods.diffusion_dpo:DiffusionDPO",
        "diffusion_dro": "mmalign.methods.diffusion_dro:DiffusionDRO",
        "diffusion_kto": "mmalign.methods.diffusion_kto:DiffusionKTO",
        "inpo": "mmalign.methods.inpo:InPO",
        "lpo": "mmalign.methods.lpo:LPO",
        "mapo": "mmalign.methods.mapo:MaPO",
        "prdp": "mmalign.methods.prdp:PRDP",
        "rdpo": "mmalign.methods.rdpo:RDPO",
        "rrpo": "mmalign.methods.rrpo:RRPO",
        "sft": "mmalign.methods.sft:SFT",
        "smpo": "mmalign.methods.smpo:SmPO",
        "spo": "mmalign.methods.spo:SPO",
        "temple": "mmalign.methods.temple:Temple",
        "tpo": "mmalign.methods.tpo:TPO",
        "vdpo": "mmalign.methods.vdpo:VDPO",
        "vlm_dpo": "mmalign.methods.vlm_dpo:VlmDPO",
        "vlm_sft": "mmalign.methods.vlm_sft:VlmSFT",
    },
    "mmalign.methods",
)

question_sets = Registry(
    "question set", {"shapes": "mmalign.shapes.question_set:ShapesQuestions"}, "mmalign.question_sets"
)
"""Classes that satisfy `mmalign.core.io.question_sets.QuestionSet`."""

false_captions = Registry(
    "language of captions", {"shapes": "mmalign.shapes.perturb:false_captions"}, "mmalign.false_captions"
)
"""Functions from a caption to captions that are false wherever it is true, by the kind of edit."""
