"""Prompt files as their authors publish them, and every way in which one can be wrong."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mmalign.core.errors import UserError
from mmalign.data.prompts import Prompt, builtin_prompt_sets, load_prompts


def shared_prompts(name: str) -> Path:
    """Return a published prompt file, or skip: they lie outside the repository."""
    root = Path(os.environ.get("MMALIGN_SHARED", Path(__file__).resolve().parents[3] / "shared"))
    path = root / "prompts" / name
    if not path.is_file():
        pytest.skip(f"{name} is not here (set MMALIGN_SHARED to the folder that holds prompts/{name})")
    return path


def write(tmp_path: Path, name: str, content: str, encoding: str = "utf-8") -> Path:
    path = tmp_path / name
    path.write_text(content, encoding=encoding)
    return path


def test_published_drawbench():
    prompts = load_prompts(shared_prompts("drawbench.csv"))
    assert len(prompts) == 200
    assert prompts[0] == Prompt("A red colored car.", "Colors")
    assert sum(prompt.category == "DALL-E" for prompt in prompts) == 20
    assert any(prompt.text.startswith("A stack of 3 plates. A blue plate is on") for prompt in prompts)


def test_published_partiprompts_keep_unescaped_quotation_marks():
    prompts = load_prompts(shared_prompts("PartiPrompts.tsv"))
    assert len(prompts) == 1632
    assert prompts[0] == Prompt("bond", "Abstract")
    assert any(prompt.text.startswith('"G I G G L E" painted in thick') for prompt in prompts)


def test_published_geneval_takes_the_tag_as_category():
    prompts = load_prompts(shared_prompts("geneval.jsonl"))
    assert len(prompts) == 553
    assert prompts[0] == Prompt("a photo of a bench", "single_object")


def test_csv_with_byte_order_mark_quotes_and_line_break(tmp_path):
    text = 'Prompts,Category\n"a cup, a ""big"" one",Colors\n"two\nlines",Counting\n'
    prompts = load_prompts(write(tmp_path, "set.csv", text, "utf-8-sig"))
    assert prompts == [Prompt('a cup, a "big" one', "Colors"), Prompt("two\nlines", "Counting")]


def test_tsv_unwraps_only_fields_quoted_as_a_whole(tmp_path):
    path = write(tmp_path, "set.tsv", 'Prompt\tCategory\n"say ""hi"""\tA\n"x" and "y"\tB\n')
    assert [prompt.text for prompt in load_prompts(path)] == ['say "hi"', '"x" and "y"']


def test_plain_text_has_one_prompt_a_line_and_no_category(tmp_path):
    assert load_prompts(write(tmp_path, "set.txt", "a red circle\n\n  a ring \n")) == [
        Prompt("a red circle"),
        Prompt("a ring"),
    ]


def test_json_list_of_strings_or_objects(tmp_path):
    path = write(tmp_path, "set.json", json.dumps(["a ring", {"prompt": "a star", "category": "one"}]))
    assert load_prompts(path) == [Prompt("a ring"), Prompt("a star", "one")]


def test_limit_takes_the_first(tmp_path):
    path = write(tmp_path, "set.txt", "one\ntwo\nthree\n")
    assert [prompt.text for prompt in load_prompts(path, limit=2)] == ["one", "two"]
    with pytest.raises(UserError, match="at least 1"):
        load_prompts(path, limit=0)


def test_duplicates_are_kept_and_reported(tmp_path, capsys):
    prompts = load_prompts(write(tmp_path, "set.txt", "a ring\na star\na ring\n"))
    assert [prompt.text for prompt in prompts] == ["a ring", "a star", "a ring"]
    assert "1 of 3 prompts repeat an earlier one (kept), e.g. 'a ring'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("set.csv", "text_en,Kind\na,b\n", "found 'text_en', 'Kind', expected one of prompt, prompts"),
        ("set.csv", "", "holds no prompt"),
        ("set.csv", "Prompts,Category\n", "holds no prompt"),
        ("set.csv", "Prompts,Category\n,Colors\n", "record 2 has no prompt in column 'Prompts'"),
        ("set.csv", "Prompts,Category\na cup, blue,Colors\n", "record 2 has 3 fields for 2 columns"),
        ("set.csv", 'prompt\na cup\n"a ring\na star\n', "the record that starts in line 3 is no CSV"),
        ("set.csv", 'prompt\n"Stop" on a sign\n', "the record that starts in line 2 is no CSV"),
        ("set.csv", 'prompt\n"' + "red " * 40_000 + '"\n', "field larger than field limit (131072)"),
        ("set.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2 is not JSON"),
        ("set.jsonl", '{"tag": "x"}\n', "record 1 has no prompt text; found 'tag'"),
        ("set.json", '{"a": 1}', "holds a JSON dict"),
        ("set.txt", "\n\n", "holds no prompt"),
        ("set.xlsx", "x", "cannot tell the format from '.xlsx'"),
    ],
)
def test_faulty_files_are_named_with_the_fault(tmp_path, name, content, message):
    path = write(tmp_path, name, content)
    with pytest.raises(UserError) as error:
        load_prompts(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_text_that_is_not_utf8(tmp_path):
    with pytest.raises(UserError, match="not UTF-8"):
        load_prompts(write(tmp_path, "set.txt", "caf\u00e9", "latin-1"))


def test_unknown_name_suggests_the_nearest(tmp_path):
    write(tmp_path, "animals.csv", "prompt\na cat\n")
    with pytest.raises(UserError, match="did you mean '.*animals.csv'"):
        load_prompts(tmp_path / "animal.csv")
    with pytest.raises(UserError, match="is a directory"):
        load_prompts(tmp_path)


def test_builtin_sets_load_by_name(monkeypatch, tmp_path):
    (tmp_path / "assets" / "prompts").mkdir(parents=True)
    write(tmp_path / "assets" / "prompts", "shapes-mini.csv", "Prompts,Category\na red circle,colors\n")
    monkeypatch.setattr("mmalign.data.prompts.resource_root", lambda: tmp_path)
    assert list(builtin_prompt_sets()) == ["shapes-mini"]
    assert load_prompts("shapes-mini") == [Prompt("a red circle", "colors")]
    with pytest.raises(UserError, match=r"\(built in: shapes-mini\); did you mean 'shapes-mini'\?"):
        load_prompts("shape-mini")


def test_a_pipe_is_read_as_text(tmp_path):
    pipe = tmp_path / "pipe.csv"  # its name tells nothing about what is written into it
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as writer:
        writer.submit(pipe.write_text, "a red cup, blue\n\na star\n")
        assert [prompt.text for prompt in load_prompts(pipe)] == ["a red cup, blue", "a star"]
