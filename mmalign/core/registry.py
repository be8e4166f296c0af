"""The tables of what mmalign finds by name, such as methods: names to classes, imported only when asked for."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from mmalign.core.errors import UserError, did_you_mean
from rewards.lookup import Lookup


class Registry(Lookup):
    """`rewards.lookup.Lookup` with the errors of mmalign."""

    def __init__(self, kind: str, builtin: Mapping[str, str], entry_point_group: str | None = None) -> None:
        """Keep the table; nothing is imported."""
        super().__init__(kind, builtin, entry_point_group, UserError, did_you_mean)

    def name_of(self, target: type) -> str:
        """Return how a configuration names a class: by its name, by its dotted path, or else registered here.

        Raises:
            UserError: see `register`.
        """
        name = getattr(target, "name", "")
        if isinstance(name, str) and name in self and self.get(name) is target:
            return name
        return dotted_path(target) or str(self.register(target).name)


def dotted_path(target: type) -> str | None:
    """Return "module:Class" if another process finds the class by it, None for one of a notebook or a function."""
    found = sys.modules.get(target.__module__)
    if target.__module__ == "__main__" or getattr(found, target.__qualname__, None) is not target:
        return None
    return f"{target.__module__}:{target.__qualname__}"


methods = Registry(
    "method",
    {
        "align_prop": "mmalign.methods.align_prop:AlignProp",
        "awm": "mmalign.methods.awm:AWM",
        "capo": "mmalign.methods.capo:CaPO",
        "ddpo": "mmalign.methods.ddpo:DDPO",
        "dense_dpo": "mmalign.methods.dense_dpo:DenseDPO",
        "dgpo": "mmalign.methods.dgpo:DGPO",
        "diffusion_dpo": "mmalign.methods.diffusion_dpo:DiffusionDPO",
        "diffusion_dro": "mmalign.methods.diffusion_dro:DiffusionDRO",
        "diffusion_kto": "mmalign.methods.diffusion_kto:DiffusionKTO",
        "flow_grpo": "mmalign.methods.flow_grpo:FlowGRPO",
        "inpo": "mmalign.methods.inpo:InPO",
        "lpo": "mmalign.methods.lpo:LPO",
        "mapo": "mmalign.methods.mapo:MaPO",
        "nft": "mmalign.methods.nft:NFT",
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

open_attributes = Registry(
    "reader of open attributes",
    {"shapes": "mmalign.shapes.open_attributes:ShapesOpenAttributes"},
    "mmalign.open_attributes",
)
"""Classes that satisfy `mmalign.core.io.open_attributes.OpenAttributes`."""

false_captions = Registry(
    "language of captions", {"shapes": "mmalign.shapes.perturb:false_captions"}, "mmalign.false_captions"
)
"""Functions from a caption to captions that are false wherever it is true, by the kind of edit."""
