"""Visual question answering: encoders, splits, every module in the model, training that resumes, the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("easy_vqa")
pytest.importorskip("transformers")

from PIL import Image

from python_models.__main__ import main
from python_models.vqa import data, encoders, evaluation, results, training
from python_models.vqa.config import Config
from python_models.vqa.fusions import FUSIONS
from python_models.vqa.model import VisualQuestionAnswering
from python_models.vqa.poolings import POOLINGS

SMALL = Config(dim=16, fused=12, heads=2, batch=60, epochs=3, learning_rate=1e-2)


@pytest.fixture(scope="module")
def puzzle() -> data.Dataset:
    """Every region tells two digits of its picture; the question is which of the two is meant."""
    generator = torch.Generator().manual_seed(0)
    pictures, regions, texts = 400, encoders.GRID**2, 2
    digits = torch.randint(0, 2, (pictures, 2), generator=generator)
    features = 0.1 * torch.randn(pictures, regions, encoders.REGION_DIM, generator=generator)
    features[..., :4] += torch.nn.functional.one_hot(digits, 2).flatten(1)[:, None]
    sentences = torch.nn.functional.normalize(torch.randn(texts, encoders.QUESTION_DIM, generator=generator), dim=1)

    def part(first: int, last: int) -> data.Part:
        picture = torch.arange(first, last).repeat_interleave(texts)
        question = torch.arange(texts).repeat(last - first)
        return data.Part(picture, question, digits[picture, question])

    parts = {"train": part(0, 300), "validation": part(300, 350), "test": part(350, 400)}
    return data.Dataset(features, ("first?", "second?"), sentences, ("zero", "one"), parts, ())


def test_parts_of_the_real_data_share_no_picture() -> None:
    texts = tuple(sorted({*data.easy_vqa.get_train_questions()[0], *data.easy_vqa.get_test_questions()[0]}))
    parts = data._parts(texts, data.answers(), len(data.easy_vqa.get_train_image_paths()))
    pictures = [set(part.picture.tolist()) for part in parts.values()]
    assert [len(one) for one in pictures] == [3600, 400, 1000]
    assert not pictures[0] & pictures[1] and not (pictures[0] | pictures[1]) & pictures[2]
    assert sum(map(len, parts.values())) == 38575 + 9673
    asked = parts["test"]
    question, answer = texts[int(asked.question[0])], data.answers()[int(asked.answer[0])]
    given = data.easy_vqa.get_test_questions()
    assert (question, answer, int(asked.picture[0])) == (given[0][0], given[1][0], given[2][0] + 4000)


def test_the_picture_encoder_knows_a_cat_and_a_coffee() -> None:
    """The weights fit the network: ImageNet's names of what real photographs show."""
    skimage_data = pytest.importorskip("skimage.data")
    from python_models.vqa import efficientnet

    model = efficientnet.pretrained()
    for name, classes in (("chelsea", {281, 282, 285}), ("coffee", {504, 967})):
        photograph = Image.fromarray(getattr(skimage_data, name)()).resize((224, 224), Image.Resampling.BICUBIC)
        pixels = torch.frombuffer(bytearray(photograph.tobytes()), dtype=torch.uint8).view(224, 224, 3)
        assert int(model(pixels.permute(2, 0, 1)[None]).argmax()) in classes


def test_encoders_give_the_sizes_they_say() -> None:
    path = Path(data.easy_vqa.get_test_image_paths()[0])
    regions = encoders.PictureEncoder()(encoders.pixels(Image.open(path))[None])
    assert regions.shape == (1, encoders.GRID**2, encoders.REGION_DIM)
    near, same, far = encoders.QuestionEncoder()(["Is there a circle?", "is a circle present?", "what color is it?"])
    assert near.shape == (encoders.QUESTION_DIM,) and torch.isclose(near.norm(), torch.tensor(1.0))
    assert near @ same > 0.7 > near @ far


def learnt(config: Config, puzzle: data.Dataset, epochs: int = 10) -> float:
    """The validation accuracy after a few epochs, fewer if it is high already."""
    trainer = training.Trainer(config, puzzle)
    for _ in range(epochs):
        trainer.epoch()
        if trainer.progress.accuracies[-1] > 0.9:
            break
    return trainer.progress.accuracies[-1]


def compare_forms(config: Config, puzzle: data.Dataset) -> None:
    """The same loss at first, and nearly so after a few steps: an optimizer makes much of what is little."""
    assert results.Comparison.of(config, puzzle, 1).loss_difference < 1e-5
    found = results.Comparison.of(config, puzzle, 3)
    assert found.loss_difference < 5e-3 and all(found.seconds) and all(found.peak_bytes)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_fusion_learns_what_the_words_alone_cannot(puzzle: data.Dataset, fusion: str) -> None:
    config = replace(SMALL, fusion=fusion)
    compare_forms(config, puzzle)
    if fusion == "question-alone":
        assert learnt(config, puzzle, 3) < 0.75
    else:
        assert learnt(config, puzzle) > 0.9


@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_pooling_learns(puzzle: data.Dataset, pooling: str) -> None:
    config = replace(SMALL, pooling=pooling, fusion="concat-mlp")
    compare_forms(config, puzzle)
    assert learnt(config, puzzle) > 0.9
    model = VisualQuestionAnswering(config, 2).eval()
    _, weights = model(*training.features(puzzle, puzzle.parts["test"], torch.arange(5)))
    if weights is not None:
        torch.testing.assert_close(weights.sum(1), torch.ones(5))


def test_a_plain_form_that_differs_is_told(puzzle: data.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FUSIONS, "mlb", FUSIONS["mlb"]._replace(plain=FUSIONS["linear-sum"].plain))
    assert results.Comparison.of(SMALL, puzzle, 1).loss_difference > 1e-2


def test_resumed_training_is_the_same_as_uninterrupted(puzzle: data.Dataset, tmp_path: Path) -> None:
    whole = training.Trainer(SMALL, puzzle, tmp_path / "whole")
    for _ in range(3):
        whole.epoch()
    training.Trainer(SMALL, puzzle, tmp_path / "parts").epoch()
    torch.manual_seed(99)
    again = training.Trainer(SMALL, puzzle, tmp_path / "parts")
    assert again.resume() and again.progress.epochs == 1
    again.epoch()
    again.epoch()
    assert again.progress.losses == whole.progress.losses
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    with pytest.raises(ValueError, match="dim 16, now 8"):
        training.Trainer(replace(SMALL, dim=8), puzzle, tmp_path / "parts").resume()


def test_stops_when_validation_does_not_improve() -> None:
    config = replace(SMALL, epochs=50, patience=3)
    progress = training.Progress([1.0] * 4, [0.5, 0.7, 0.7, 0.6])
    assert progress.best == 1 and not progress.is_finished(config)
    assert training.Progress([1.0] * 5, [0.5, 0.7, 0.7, 0.6, 0.7]).is_finished(config)
    assert training.Progress([1.0] * 3, [0.1, 0.2, 0.3]).is_finished(replace(config, epochs=3))


def test_accuracy_by_kind(puzzle: data.Dataset) -> None:
    renamed = replace(puzzle, answers=("circle", "red"))
    trainer = training.Trainer(SMALL, renamed)
    found = evaluation.accuracy(trainer.model, renamed)
    asked = renamed.parts["test"]
    right = training.predictions(trainer.model, renamed, asked) == asked.answer
    assert found.overall == pytest.approx(float(right.float().mean()))
    assert found.by_kind == {
        "shape": pytest.approx(float(right[asked.answer == 0].float().mean())),
        "color": pytest.approx(float(right[asked.answer == 1].float().mean())),
    }


def test_command_line(puzzle: data.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    several = replace(puzzle, answers=data.answers())
    monkeypatch.setattr(data, "load", lambda cache, report, every: several)
    folder = str(tmp_path / "run")
    small = ["--dim", "16", "--fused", "12", "--heads", "2", "--batch", "32", "--epochs", "2", "--folder", folder]
    assert main(["vqa", "train", *small]) == 0
    assert "best after epoch" in capsys.readouterr().out
    assert main(["vqa", "train", *small]) == 2
    assert main(["vqa", "evaluate", folder]) == 0
    assert "question only" in capsys.readouterr().out
    picture = data.easy_vqa.get_test_image_paths()[0]
    drawn = tmp_path / "map.png"
    assert main(["vqa", "predict", folder, str(picture), "what shape is it?", "--map", str(drawn)]) == 0
    assert drawn.stat().st_size > 1000
    assert main(["vqa", "evaluate", str(tmp_path)]) == 2
    assert "holds no trained model" in capsys.readouterr().err


def test_results_are_kept_and_written(puzzle: data.Dataset, tmp_path: Path) -> None:
    config = replace(SMALL, epochs=1)
    row = results.run(config, puzzle, tmp_path)
    states: list[str] = []
    again = results.run(config, puzzle, tmp_path, states.append)
    assert not states and (again.accuracy, again.seconds) == (row.accuracy, row.seconds)
    assert results.run(replace(config, epochs=2), puzzle, tmp_path).seconds > row.seconds
    comparison = results.Comparison((0.010, 0.025), (200_000_000, 300_000_000), 2e-6)
    results.write(tmp_path, [results.Row("mlb", "attention", 0.99, 1000, 10.0, comparison)], {"question only": 0.5})
    written = (tmp_path / results.TABLE).read_text()
    assert "| mlb | attention | 99.00% | 1000 | 10 | 10.0 | 25.0 | 2.50x | 200 | 300 | 2.0e-06 |" in written
    assert "question only: 50.00%" in written


def test_every_module_is_compared_once() -> None:
    models = results.models()
    assert len(models) == len(FUSIONS) + len(POOLINGS) - 1 == len(set(models))
