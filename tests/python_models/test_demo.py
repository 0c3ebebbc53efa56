"""The demo: what it feeds ViLT, training in turns, whole models, what it shows, and what it calls wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("easy_vqa")
pytest.importorskip("transformers")

import velm_kernels
from python_models.demo import __main__ as demo
from python_models.demo import families, inputs, plots, training
from python_models.vqa import data, evaluation
from python_models.vqa.model import VisualQuestionAnswering
from velm_kernels.integrations import zoo


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> data.Dataset:
    """A hundredth of the pictures, encoded."""
    return data.load(tmp_path_factory.mktemp("features") / "features.pt", every=100)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ViLT of seconds, and one whole model."""
    for name, value in {"LAYERS": 1, "WIDTH": 32, "PATCH": 16}.items():
        monkeypatch.setattr(training, name, value)
    monkeypatch.setattr(families, "FAMILIES", {"blip_2_qformer": 1})


def test_tokens_and_words() -> None:
    tokenizer = inputs.Tokenizer(["is there a circle?", "what shape?"])
    tokens = tokenizer(["Is there a zebra?", "what shape?"])
    assert tokens.shape == (2, tokenizer.length) == (2, 6)
    assert tokens[0, 0] == tokens[1, 0] == tokenizer.ids["[CLS]"]
    assert tokens[0, 4] == tokenizer.ids["[UNK]"]
    assert tokens[1].tolist()[-2:] == [0, 0]
    assert (tokens[0] != 0).all()


def test_a_part_of_the_pictures_keeps_its_questions_and_answers(dataset: data.Dataset) -> None:
    """What is said to be red is red, and each picture has the features that belong to it."""
    assert [len(set(part.picture.tolist())) for part in dataset.parts.values()] == [36, 4, 10]
    assert len(dataset.regions) == len(dataset.paths) == 50
    train, asked = dataset.parts["train"], 0
    for picture, question, answer in zip(train.picture, train.question, train.answer, strict=True):
        if dataset.answers[int(answer)] == "red" and dataset.texts[int(question)].startswith("what"):
            pixels = inputs.pixels(dataset.paths[int(picture)]).float().flatten(1)
            shape = pixels[:, pixels.sum(0).argmin()]
            assert shape[0] > shape[1] + 40 and shape[0] > shape[2] + 40
            asked += 1
    assert asked
    encoded = data.encoders.PictureEncoder()(data.encoders.pixels(data.Image.open(dataset.paths[-1]))[None])
    torch.testing.assert_close(encoded[0], dataset.regions[-1], rtol=1e-3, atol=1e-3)


def test_features_of_other_pictures_are_encoded_anew(dataset: data.Dataset, tmp_path: Path) -> None:
    cache = tmp_path / "features.pt"
    assert len(data.load(cache, every=400).paths) == 20
    assert len(data.load(cache, every=300).paths) == 20
    told: list[int] = []
    again = data.load(cache, lambda done, total: told.append(done), every=300)
    assert not told
    whole = dict(zip(dataset.paths, dataset.regions, strict=True))
    assert again.paths[-1] in whole
    torch.testing.assert_close(again.regions[-1], whole[again.paths[-1]], rtol=1e-3, atol=1e-3)


def test_training_in_turns_coincides(dataset: data.Dataset, small: None) -> None:
    tokenizer = inputs.Tokenizer(dataset.texts)
    model = training.build(tokenizer, len(dataset.answers))
    found = training.in_turns(model, velm_kernels.patch, dataset, tokenizer, steps=3, batch_size=4)
    assert found.report.replaced
    assert len(found.plain.losses) == len(found.patched.seconds) == 3
    assert len(set(found.plain.losses)) == 3
    assert found.loss_difference < 1e-5


def test_whole_models_are_compared_in_both_dtypes(small: None) -> None:
    fp32, bf16 = families.comparisons(1, 1, 1000.0)
    assert (fp32.dtype, bf16.dtype) == ("fp32", "bf16")
    assert fp32.replaced == bf16.replaced > 0
    assert fp32.errors[0] == 0.0 < bf16.errors[0]
    assert fp32.is_right and bf16.is_right
    assert fp32.saved_bytes[0] > bf16.saved_bytes[0] > 0 < bf16.peak_bytes[1] < fp32.peak_bytes[1]
    assert all(fp32.step_ms) and all(bf16.inference_ms)
    assert not dataclasses.replace(bf16, errors=(bf16.errors[0], 3 * bf16.errors[0])).is_right
    assert len(list(families.comparisons(1, 0, 0.0))) == 1


def test_the_short_demo_shows_nothing_that_it_has_not_earned(small: None, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(demo, "EVERY", 100)
    assert demo.main(["--short", "--threads", "1", "--steps", "2", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "results.json").read_text())
    assert "losses differ by at most" in printed and written["patch"]["largest_relative_loss_difference"] < 1e-5
    assert written["patch"]["replaced"] and len(written["families"]) == 2
    assert " ms" not in printed and "WRONG" not in printed and "trained model" not in printed
    assert not any(one["step_ms"] for one in written["families"])
    assert "step_ms" not in written["patch"] and "held_out" not in written["question_answering"]
    assert not list(tmp_path.glob("*.png"))


def test_the_whole_demo_draws_its_run_and_calls_a_model_wrong_that_learnt_too_little(
    dataset: data.Dataset, small: None, tmp_path: Path, monkeypatch, capsys
) -> None:
    """With a hundredth of the pictures one epoch is not enough."""
    monkeypatch.setattr(demo.commands, "load", lambda console, cache, every: dataset)
    arguments = ["--threads", "1", "--epochs", "1", "--steps", "2", "--batch", "4", "--rounds", "1", "--seconds", "0"]
    assert demo.main([*arguments, "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "held-out questions are answered rightly, fewer than 95%" in printed and printed.count("WRONG") == 1
    written = json.loads((tmp_path / "results.json").read_text())
    assert f"{written['question_answering']['held_out']['overall']:.1%}" in printed
    assert all(written["patch"]["step_ms"]) and len(written["families"]) == 1
    assert "1 of 2 were not begun" in printed
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_shown_does_not_depend_on_the_answers(dataset: data.Dataset) -> None:
    config = dataclasses.replace(demo.CONFIG, dim=16, fused=16)
    shown = [demo.look(VisualQuestionAnswering(config, len(dataset.answers)), dataset) for _ in range(2)]
    assert [one.question for one in shown[0]] == [one.question for one in shown[1]]
    assert len({one.picture for one in shown[0]}) == len(shown[0]) == len(demo.SHOWN)
    for one, wanted in zip(shown[0], demo.SHOWN, strict=True):
        assert wanted in (one.right, data.kind(one.right))
        torch.testing.assert_close(one.found.weights.sum(), torch.tensor(1.0))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, None),
        ({"losses": [1.0, 0.502]}, "the losses of ViLT differ by 4.0e-03"),
        ({"losses": [1.0, float("nan")]}, "the losses of ViLT differ by nan"),
        ({"changed": 1e-3}, "patch changes the outputs of ViLT"),
        ({"replaced": 0}, "patch replaced nothing"),
        ({"forms": 1e-2}, "the losses of visual question answering differ"),
        ({"errors": (1e-3, 3e-3)}, "siglip in bf16 is off by 3.0e-03 after patch, by 1.0e-03 before"),
        ({"reached": 0.949}, "94.9% of the held-out questions"),
    ],
)
def test_what_is_wrong_is_called_so(change: dict, told: str | None) -> None:
    plain, patched = training.Trained(torch.nn.Linear(1, 1)), training.Trained(torch.nn.Linear(1, 1))
    plain.losses, patched.losses = [1.0, 0.5], change.get("losses", [1.0, 0.5])
    report = velm_kernels.patch(zoo.build("blip_2_qformer", layers=1)[0])
    model = families.Comparison(
        "siglip",
        1,
        "",
        "bf16",
        change.get("replaced", 9),
        change.get("errors", (1e-3, 2e-3)),
        None,
        None,
        (1, 1),
        (1, 1),
    )
    forms = demo.results.Comparison((0.1, 0.2), (1, 1), change.get("forms", 0.0))
    reached = evaluation.Accuracy(change.get("reached", 0.95), {})
    vilt = training.InTurns(plain, patched, report)
    found = demo.faults(vilt, change.get("changed", 0.0), forms, [model], reached)
    assert len(found) == (told is not None)
    assert not told or found[0].startswith(told)


def test_a_place_without_a_time_stays_empty(tmp_path: Path) -> None:
    model = families.Comparison("vilt", 1, "", "fp32", 9, (0.0, 1e-7), (3.0, 2.0), None, (2**20, 2**19), (2**21, 2**20))
    picture = data.easy_vqa.get_test_image_paths()[0]
    unweighed = plots.Asked(Path(picture), "is it red?", evaluation.Prediction([("no", 0.9)], None), "yes")
    shown = plots.Shown(
        "here", ([2.0], [2.0]), 0.0, [plots.Turns("vilt", (2.0, 1.0))], {"all": 0.5}, ["all"], [unweighed], [model]
    )
    plots.overview(tmp_path / "new" / "demo.png", shown)
    assert (tmp_path / "new" / "demo.png").read_bytes().startswith(b"\x89PNG")
