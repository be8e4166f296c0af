"""The shipped prompt sets: made again byte for byte, of the right size, and apart from one another."""

from __future__ import annotations

from collections import Counter

from mmalign.core.resources import find
from mmalign.data.prompts import load_prompts
from mmalign.shapes.language import Group, Query, parse, split_of
from mmalign.shapes.prompts import TEST_COUNTS, asks_for_held_out, write_prompt_sets

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
            held = asks_for_held_out(query)
            assert held == (prompt.category == "Conflicting"), prompt


def test_a_held_out_relation_is_known_in_both_reading_directions() -> None:
    star, ring = Group("star", 1, "cyan"), Group("ring", 1, "pink")
    assert asks_for_held_out(Query((star, ring), ((0, "left of", 1),)))
    assert asks_for_held_out(Query((ring, star), ((0, "right of", 1),)))
    assert not asks_for_held_out(Query((ring, star), ((0, "left of", 1),)))
