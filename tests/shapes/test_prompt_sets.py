"""The shipped prompt sets: made again byte for byte, of the right size, and apart from one another."""

from __future__ import annotations

from collections import Counter

from mmalign.data.prompts import load_prompts
from mmalign.resources import find
from mmalign.shapes.language import parse, split_of
from mmalign.shapes.prompts import TEST_COUNTS, write_prompt_sets
from mmalign.shapes.world import HELD_OUT_OBJECTS, HELD_OUT_RELATIONS

SETS = {"shapes-drawbench": "test", "shapes-validation": "validation", "shapes-train": "train"}


def test_sets_are_made_again_byte_for_byte(tmp_path) -> None:
    write_prompt_sets(tmp_path)
    for name in SETS:
        assert (tmp_path / f"{name}.csv").read_bytes() == find(f"assets/prompts/{name}.csv").read_bytes()


def test_splits_do_not_meet_and_every_prompt_can_be_read() -> None:
    for name, split in SETS.items():
        prompts = load_prompts(name)
        assert len({p.text for p in prompts}) == len(prompts)
        assert {split_of(p.text) for p in prompts} == {split}
        for prompt in prompts:
            parse(prompt.text)
    assert len(load_prompts("shapes-train")) > 3000


def test_test_set_mirrors_drawbench() -> None:
    prompts = load_prompts("shapes-drawbench")
    assert Counter(p.category for p in prompts) == TEST_COUNTS
    assert len(prompts) == 200


def test_only_the_conflicting_prompts_ask_for_held_out_combinations() -> None:
    for name in SETS:
        for prompt in load_prompts(name):
            query = parse(prompt.text)
            held = any((g.colour, g.shape) in HELD_OUT_OBJECTS for g in query.groups)
            held |= any(
                (query.groups[a].shape, r, query.groups[b].shape) in HELD_OUT_RELATIONS for a, r, b in query.relations
            )
            assert held == (prompt.category == "Conflicting"), prompt
