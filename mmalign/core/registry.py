"""Names to classes, imported only when asked for: built-in, installed plug-in (entry point) or dotted path."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from mmalign.core.errors import UserError, did_you_mean


class Registry:
    """Look up one kind of thing by name.

    Args:
        kind: the word used in messages, such as "method".
        builtin: name -> "module:attribute".
        entry_point_group: the group under which installed packages offer their own, such as "mmalign.methods".
    """

    def __init__(self, kind: str, builtin: Mapping[str, str], entry_point_group: str | None = None) -> None:
        """Keep the table; nothing is imported."""
        self.kind = kind
        self.entry_point_group = entry_point_group
        self._builtin = dict(builtin)

    def names(self) -> list[str]:
        """Return every name that `get` knows, sorted; a dotted path is always understood besides."""
        return sorted({*self._builtin, *self._plugins()})

    def __contains__(self, name: str) -> bool:
        """Tell whether `name` is a known name (a dotted path is not)."""
        return name in self._builtin or name in self._plugins()

    def get(self, name: str) -> Any:
        """Import and return what `name` stands for; a built-in wins over a plug-in of the same name.

        Raises:
            UserError: the name is unknown, or what it names cannot be imported.
        """
        if name in self._builtin:
            return self._load(name, self._builtin[name])
        plugin = self._plugins().get(name)
        if plugin is not None:
            return self._load(name, plugin.value)
        if ":" in name:
            return self._load(name, name)
        known = ", ".join(self.names()) or "none"
        raise UserError(
            f"unknown {self.kind} '{name}'{did_you_mean(name, self.names())} (known: {known}; "
            f"or your own as 'package.module:Class')"
        )

    def _plugins(self) -> dict[str, EntryPoint]:
        if self.entry_point_group is None:
            return {}
        return {point.name: point for point in entry_points(group=self.entry_point_group)}

    def _load(self, name: str, target: str) -> Any:
        module_name, _, attribute = target.partition(":")
        if name not in self._builtin and os.getcwd() not in sys.path:
            # A console script does not search the working directory, where people keep their own methods. It goes
            # last, so that no file there can shadow an installed module.
            sys.path.append(os.getcwd())
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise UserError(f"{self.kind} '{name}': cannot import {module_name}: {error}") from error
        try:
            return getattr(module, attribute)
        except AttributeError:
            offered = [word for word in vars(module) if not word.startswith("_")]
            raise UserError(
                f"{self.kind} '{name}': {module_name} has no '{attribute}'{did_you_mean(attribute, offered)}"
            ) from None


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
