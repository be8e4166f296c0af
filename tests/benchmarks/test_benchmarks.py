"""The benchmarks run at their smallest size, both sides agree, and the arithmetic of the report is right."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import BENCHMARKS, answer_step, cpu_attention, memory, sampling, scoring, training_step
from benchmarks.__main__ import main
from benchmarks.models import write_pipeline
from benchmarks.timing import Report, Settings, interleave

SMALLEST = Settings(torch.device("cpu"), repeats=1, warmup=0, batch=2, steps=2)


def test_sides_are_called_in_turn_and_the_warm_up_is_not_counted() -> None:
    calls: list[str] = []
    settings = Settings(torch.device("cpu"), repeats=2, warmup=1)
    seconds = interleave({side: lambda side=side: calls.append(side) for side in "ab"}, settings)
    assert "".join(calls) == "ababab"
    assert {side: len(times) for side, times in seconds.items()} == {"a": 2, "b": 2}


def test_the_ratio_is_that_of_the_rounds_and_not_of_the_medians() -> None:
    # The machine was three times slower in the last two rounds, once for one side alone.
    report = Report("", {"a": [2.0, 2.0, 6.0, 6.0, 2.0], "b": [1.0, 1.0, 3.0, 3.0, 3.0]}, {"a / b": ("a", "b")})
    assert (report.median("a"), report.median("b")) == (2.0, 3.0)
    assert report.ratio("a / b") == (2.0, 2.0, 2.0)
    assert report.as_json()["ratios"]["a / b"]["median"] == 2.0


def test_training_step_measures_all_three_sides_of_both_kinds() -> None:
    reports = training_step.measure(SMALLEST)
    assert ["lora" in reports[0].title, "full" in reports[1].title] == [True, True]
    for report in reports:
        assert list(report.seconds) == ["mmalign", "public recipe", "lower bound"]
        assert report.images == 4


def test_answers_in_shared_rows_are_as_likely_as_in_rows_of_their_own() -> None:
    for report in answer_step.measure(SMALLEST):
        assert list(report.seconds) == ["mmalign", "a row an answer", "one answer a pair"]
        spread = float(report.facts["spread of log-probabilities"])
        assert float(report.facts["max difference of log-probabilities"]) < 1e-4 < spread


def test_sampling_compares_equal_images() -> None:
    (report,) = sampling.measure(SMALLEST)
    assert float(report.facts["max difference of pixels"]) < 1e-4 < float(report.facts["spread of pixels"])


def test_scoring_compares_equal_scores() -> None:
    memory, files = scoring.measure(SMALLEST)
    assert float(memory.facts["with preprocessing='reference'"]) < 1e-5
    for report in (memory, files):
        assert float(report.facts["max difference of scores"]) < 1e-2
    assert list(files.seconds) == ["mmalign score", "open_clip directly"]
    assert (memory.images, files.images) == (2, 8)


def test_attention_kernels_agree_and_are_skipped_on_a_gpu() -> None:
    bf16, fp32 = cpu_attention.measure(SMALLEST)
    assert float(fp32.facts["max difference of outputs"]) < 1e-4 < float(fp32.facts["spread of outputs"])
    assert list(bf16.seconds) == ["flash", "math"]
    (skipped,) = cpu_attention.measure(Settings(torch.device("cuda")))
    assert skipped.skipped and not skipped.seconds


def test_a_step_with_checkpointing_peaks_lower(tmp_path: Path) -> None:
    model = str(write_pipeline(tmp_path))
    plain, checkpointed = (memory.peak_of_step(model, "cpu", 2, 8, side, 1)["peak"] for side in (False, True))
    # The two calls keep far more than ten feature maps of 64 channels of 16x16 in bfloat16, for 16 images each.
    assert plain > 10 * 2 * 16 * 64 * 16 * 16 * 2 and checkpointed < plain


def test_settings_that_would_not_fit_are_foretold_and_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {"5": 100, "10": 200, "20": 400}

    def answer(command: list[str], **_: object) -> SimpleNamespace:
        steps = str(json.loads(command[-1])[2])
        return SimpleNamespace(stdout=json.dumps({"peak": peaks[steps] * memory.MIB, "seconds": 1.5}))

    monkeypatch.setattr(memory.subprocess, "run", answer)
    monkeypatch.setattr(memory, "_free", lambda device: 1000 * memory.MIB)
    (report,) = memory.measure(Settings(torch.device("cpu")))
    headings, rows = report.table()
    assert headings[:3] == ["sampling steps", "checkpointing, MiB", "checkpointing, s"]
    assert rows[2] == ["20", "400", "1.5", "400", "1.5"] and rows[3][:2] == ["50", "not run, about 1000"]
    assert report.notes()[:2] == [f"{side}: 20.00 MiB for each further step" for side in report.peaks]
    assert report.as_json()["peaks"][memory.PLAIN] == {
        5: 100 * memory.MIB,
        10: 200 * memory.MIB,
        20: 400 * memory.MIB,
        50: None,
    }
    assert report.facts["latents of one step"] == "0.06 MiB"  # 16 images of 4 channels of 16x16 in float32


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report("a title", {"ours": [0.002], "theirs": [0.003]}, {"theirs / ours": ("theirs", "ours")}, images=4)
    monkeypatch.setattr(sampling, "measure", lambda settings: [report])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["sampling", "--quick", "--json", str(tmp_path / "out.json")]) == 0
    printed = capsys.readouterr().out
    assert "theirs / ours: 1.50" in printed and "2000.0" in printed and "threads 1" in printed
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["benchmarks"]["sampling"][0]["sides"]["ours"]["median_s"] == 0.002
    assert written["settings"]["repeats"] == 3
    assert main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(BENCHMARKS)
    with pytest.raises(SystemExit):
        main(["samplin"])
    assert "did you mean 'sampling'?" in capsys.readouterr().err
