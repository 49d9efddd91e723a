"""The demo models: files of the trained one, recipe and cache of the random one. Serving is an integration test's."""

import hashlib
import json

import pytest

from rorqual import demo
from rorqual.errors import RorqualError
from rorqual.model_config import LayerKind, parse_model_config


def test_the_recipe_is_a_model_with_every_kind_of_layer():
    config = parse_model_config(demo.CONFIG)
    kinds = [layer.kind for layer in config.layers]
    assert kinds == [LayerKind.WINDOW, *[LayerKind.CSA, LayerKind.HCA] * 3, LayerKind.CSA]
    assert config.vocab_size == 129280
    assert config.num_mtp_blocks == 1
    assert config.quantised
    assert config.layers[0].hash_routed
    assert not config.layers[1].hash_routed


def test_the_tokenizer_is_found_without_loading_it():
    with demo.find_tokenizer().open() as file:
        assert file.read(1) == "{"


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Replaces the process that makes the weights by one that notes it was asked."""
    calls = []

    def init(*, config, seed, out, tokenizer):
        calls.append({"config": json.loads(config.read_text()), "seed": seed})
        out.mkdir()
        (out / "config.json").write_text("{}")

    monkeypatch.setattr(demo, "_init", init)
    return calls


def test_the_model_is_made_once(tmp_path, made, capsys):
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    first = demo.make_model(folder=tmp_path / "models", seed=1, tokenizer=tokenizer)
    assert demo.make_model(folder=tmp_path / "models", seed=1, tokenizer=tokenizer) == first
    assert made == [{"config": demo.CONFIG, "seed": 1}]
    assert "RANDOM" in capsys.readouterr().out


def test_another_seed_or_tokenizer_is_another_model(tmp_path, made):
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    models = {demo.make_model(folder=tmp_path / "m", seed=seed, tokenizer=tokenizer) for seed in (1, 2)}
    tokenizer.write_text("{ }")
    models.add(demo.make_model(folder=tmp_path / "m", seed=1, tokenizer=tokenizer))
    assert len(models) == len(made) == 3


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(RorqualError, match=r"nowhere\.json: no such file"):
        demo.make_model(folder=tmp_path, seed=1, tokenizer=tmp_path / "nowhere.json")


@pytest.fixture
def trained(tmp_path):
    """A folder with a list of its files' digests."""
    for name in ("config.json", "model-00001-of-00001.safetensors"):
        (tmp_path / name).write_text(name)
    sums = [
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}" for file in sorted(tmp_path.iterdir())
    ]
    (tmp_path / demo.SUMS_FILE).write_text("\n".join(sums) + "\n")
    return tmp_path


def test_a_whole_trained_model_is_served_as_it_is(trained):
    assert demo.trained_model(trained) == trained


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00001.safetensors", demo.SUMS_FILE])
def test_a_missing_file_of_the_trained_model_is_named_with_the_command_that_remakes_it(trained, name):
    (trained / name).unlink()
    with pytest.raises(RorqualError, match=r"python models/demo/train\.py") as failure:
        demo.trained_model(trained)
    assert str(trained / name) in str(failure.value)


def test_a_file_that_was_changed_is_named(trained):
    with (trained / "model-00001-of-00001.safetensors").open("ab") as file:
        file.write(b"!")
    with pytest.raises(RorqualError, match=r"safetensors: is not what was trained"):
        demo.trained_model(trained)
