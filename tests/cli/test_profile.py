"""`velm profile` and `velm bench` on small work."""

from __future__ import annotations

import inspect
import json

import pytest
import torch

import velm_kernels
from velm_kernels.cli import main
from velm_kernels.integrations import zoo

transformers = pytest.importorskip("transformers")

TINY = {
    "model_type": "visual_bert",
    "vocab_size": 99,
    "visual_embedding_dim": 20,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def test_profile_of_a_config_file(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    assert main(["profile", str(path), "--rounds", "1"]) == 0
    shown, said = capsys.readouterr()
    assert "VisualBertModel: " in shown
    assert "peak MiB" in shown
    # What takes long is named before it begins, and is not part of the result.
    steps = [line.partition(" ...")[0] for line in said.splitlines()]
    assert steps[0] == f"velm profile: building {path} with random weights"
    assert len(steps) == 6
    assert "velm profile" not in shown


def test_wrong_outputs_exit_with_1(tmp_path, monkeypatch):
    def patch(model):
        for parameter in model.parameters():
            parameter.data.mul_(1.1)

    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    monkeypatch.setattr(velm_kernels, "patch", patch)
    assert main(["profile", str(path), "--rounds", "1"]) == 1


def test_errors_go_to_stderr(tmp_path, capsys):
    """And name what is expected, without a stack trace."""
    bert = tmp_path / "config.json"
    bert.write_text(json.dumps({"model_type": "bert"}))
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    for arguments, expected in (
        (["no_such_model"], "vilt"),
        ([str(bert)], "inputs are known for"),
        ([str(broken)], "JSON"),
        ([], "vilt"),
        (["vilt", "--device", "quantum"], "--device quantum"),
    ):
        assert main(["profile", *arguments]) == 2
        shown, said = capsys.readouterr()
        assert shown == ""
        assert expected in said


def test_numbers_are_positive(capsys):
    with pytest.raises(SystemExit) as raised:
        main(["profile", "vilt", "--rounds", "0"])
    assert raised.value.code == 2
    assert "--rounds: invalid positive number value: '0'" in capsys.readouterr().err


def test_bench_passes_its_arguments_on(capsys):
    assert main(["bench", "--list", "--case", "q-former", "--dtype", "fp32"]) == 0
    assert capsys.readouterr().out.count("q-former") == 2


def test_other_commands_refuse_unknown_arguments():
    with pytest.raises(SystemExit):
        main(["info", "--nonsense"])


@pytest.mark.parametrize("model", zoo.names())
def test_models_cut_to_one_layer_are_consistent(model):
    entry = zoo.MODELS[model]
    config = zoo.configuration(model, layers=1)
    with torch.device("meta"):
        built = getattr(transformers, entry.class_name)(config)
    assert velm_kernels.patch(built).replaced
    accepted = inspect.signature(built.forward).parameters
    assert not [name for name in entry.inputs(config, 1) if name not in accepted]
