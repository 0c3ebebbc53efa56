"""The pieces of the demo: data, tokenizer, training side by side, attention on regions."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("easy_vqa")
pytest.importorskip("transformers")

import velm_kernels
from python_models.demo import attention_map, data, training


@pytest.fixture(scope="module")
def loaded():
    return data.load()


def test_tokens_and_words():
    tokenizer = data.Tokenizer(["is there a circle?", "what shape?"])
    tokens = tokenizer(["Is there a zebra?", "what shape?"])
    assert tokens.shape == (2, tokenizer.length) == (2, 6)
    assert tokens[0, 0] == tokens[1, 0] == tokenizer.ids["[CLS]"]
    assert tokens[0, 4] == tokenizer.ids["[UNK]"]
    assert tokens[1].tolist()[-2:] == [0, 0]
    assert (tokens[0] != 0).all()


def test_held_out_pictures_are_others(loaded):
    train, held_out, _ = loaded
    known = {picture.numpy().tobytes() for picture in train.pictures}
    seen = sum(picture.numpy().tobytes() in known for picture in held_out.pictures)
    assert seen < len(held_out.pictures) // 100
    assert len(train) == len(train.answer) == len(train.tokens) == len(train.picture)


def test_answers_belong_to_pictures(loaded):
    """What is said to be red is red: the colour answer matches the pixels farthest from the background."""
    train, _, _ = loaded
    names = data.answers()
    asked = [n for n, q in enumerate(train.questions[:3000]) if q == "what color is the shape?"]
    red = [n for n in asked if names[int(train.answer[n])] == "red"]
    assert red
    for number in red:
        pixels = train.pictures[train.picture[number]].float().flatten(1)
        shape = pixels[:, pixels.sum(0).argmin()]
        assert shape[0] > shape[1] + 40
        assert shape[0] > shape[2] + 40


def test_baselines_are_what_they_say(loaded):
    train, held_out, _ = loaded
    found = list(data.baselines(train, held_out).values())
    counts = torch.bincount(held_out.answer)
    assert found[0] <= counts.max() / len(held_out) + 1e-6
    assert found[0] < found[1] < 0.9


def test_side_by_side_coincides_and_looks_at_the_picture(loaded, monkeypatch):
    train, held_out, tokenizer = loaded
    monkeypatch.setattr(training, "LAYERS", 1)
    monkeypatch.setattr(training, "WIDTH", 32)
    monkeypatch.setattr(training, "PATCH", 16)
    model = training.build(len(tokenizer), tokenizer.length)
    plain, fast, report = training.side_by_side(
        model, velm_kernels.patch, train, together=3, steps=4, batch_size=4, progress=lambda a, b: None
    )
    assert report.replaced
    assert len(plain.losses) == len(plain.seconds) == 3
    assert len(fast.losses) == 4
    for one, other in zip(plain.losses, fast.losses[:3], strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    reached = training.accuracy(fast.model, held_out, torch.arange(40))
    assert 0 <= reached["all"] <= 1

    mass = attention_map.regions(fast.model, held_out, 0)
    words = int((held_out.tokens[0] != 0).sum())
    assert mass.shape == (data.IMAGE_SIZE // 16,) * 2
    assert (mass > 0).all()
    assert mass.sum() < training.HEADS * words


def test_attention_on_regions_is_the_models_own(loaded, monkeypatch):
    """Against the weights that the unpatched layer returns with output_attentions=True."""
    _, held_out, tokenizer = loaded
    monkeypatch.setattr(training, "LAYERS", 2)
    monkeypatch.setattr(training, "WIDTH", 32)
    monkeypatch.setattr(training, "PATCH", 16)
    model = training.build(len(tokenizer), tokenizer.length, seed=3).eval()
    mass = attention_map.regions(model, held_out, 5)
    inputs = data.batch(held_out, torch.tensor([5]))
    words, length = int(inputs["attention_mask"].sum()), inputs["input_ids"].shape[1]
    with torch.inference_mode():
        torch.manual_seed(0)
        weights = model(**inputs, output_attentions=True).attentions[-1]
        torch.manual_seed(0)
        *_, (places, _) = model.vilt.embeddings.visual_embed(inputs["pixel_values"], inputs["pixel_mask"], -1)
    expected = weights[0, :, :words].sum((0, 1))[length + 1 :]
    got = torch.stack([mass[row, column] for row, column in places[0].tolist()])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_the_attention_is_drawn_beside_the_picture(tmp_path):
    plots = pytest.importorskip("python_models.demo.plots")
    looked = plots.Looked(torch.rand(3, 8, 8), "is there a circle?", "no", "yes", torch.rand(2, 2))
    plots.attention_on_pictures(tmp_path / "new" / "attention.png", [looked, looked])
    assert (tmp_path / "new" / "attention.png").read_bytes().startswith(b"\x89PNG")
