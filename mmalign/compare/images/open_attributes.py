"""Count what the images of every system show where their prompts leave a choice, if a registered reader knows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from PIL import Image

from mmalign.compare.images.store import Images
from mmalign.core.errors import UserError
from mmalign.core.io.open_attributes import OpenAttributes
from mmalign.core.progress import track
from mmalign.core.registry import open_attributes


@dataclass(frozen=True)
class OpenCounts:
    """How often each system showed each value of one attribute, over the prompts that leave it open.

    counts: system -> `[prompts, replicas, kinds]`, all prompts among them; a prompt that decides the attribute has 0.
    """

    kinds: tuple[str, ...]
    counts: dict[str, np.ndarray]


def count_open_attributes(stores: Mapping[str, Images], names: Mapping[str, Sequence[str]]) -> dict[str, OpenCounts]:
    """Return the counts of each attribute that a prompt leaves open; nothing if no reader knows prompts and images.

    `names`: system -> the names of its replicas' stores. An attribute of which a system shows nothing is left out.
    """
    reader = find_reader(stores)
    if reader is None:
        return {}
    cells = sum(len(store.prompts) * len(store.seeds) for store in stores.values())
    with track(cells, "read what prompts leave open") as job:
        read = {}
        for name, store in stores.items():
            read[name] = _count(reader, store)
            job.advance(len(store.prompts) * len(store.seeds))
    found = {}
    for attribute, kinds in reader.kinds.items():
        counts = {system: np.stack([read[one][attribute] for one in held], axis=1) for system, held in names.items()}
        if all((one.sum(axis=(0, 2)) > 0).all() for one in counts.values()):
            found[attribute] = OpenCounts(tuple(kinds), counts)
    return found


def find_reader(stores: Mapping[str, Images]) -> OpenAttributes | None:
    """Return the first registered reader that knows the prompts and the size of every image."""
    prompts = next(iter(stores.values())).prompts
    sizes: set[tuple[int, int]] = set()
    for store in stores.values():
        for index in range(len(store.prompts)):
            for seed in store.seeds:
                with Image.open(store.path(index, seed)) as image:
                    sizes.add(image.size)
    readers = (cast(OpenAttributes, open_attributes.get(name)()) for name in open_attributes.names())
    return next((one for one in readers if all(one.knows(prompts, *size) for size in sizes)), None)


def _count(reader: OpenAttributes, store: Images) -> dict[str, np.ndarray]:
    """Return the counts `[prompts, kinds]` of each attribute over the seeds of one system."""
    counts = {name: np.zeros((len(store.prompts), len(kinds))) for name, kinds in reader.kinds.items()}
    places = {name: {kind: place for place, kind in enumerate(kinds)} for name, kinds in reader.kinds.items()}
    for index, prompt in enumerate(store.prompts):
        for seed in store.seeds:
            with Image.open(store.path(index, seed)) as image:
                pixels = np.asarray(image.convert("RGB"))
            for name, values in reader.read(prompt, pixels).items():
                for value in values:
                    if value not in places[name]:
                        raise UserError(
                            f"{type(reader).__name__} read the {name} '{value}', which is not in its kinds"
                        )
                    counts[name][index, places[name][value]] += 1
    return counts
