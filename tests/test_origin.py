"""What an export says of where its activations come from, and what of this machine never leaves."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from sae_jax import cli
from sae_jax.activations import store
from sae_jax.config import base
from sae_jax.diagnosis import autopsy
from sae_jax.errors import Refused
from sae_jax.exchange import formats, origin, sharing
from sae_jax.runtime import checkpoint
from sae_jax.training.run import train

SECRET = "hidden_away"  # in the name of every folder and file that the run was of


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on a file, and one on a dataset that knows what it is of."""
    root = tmp_path_factory.mktemp(SECRET)
    x = np.float32(np.random.default_rng(0).normal(size=(3000, 16)) + 1)
    np.save(root / f"{SECRET}.npy", x)
    facts = {"id": "openai-community/gpt2", "layer": 4, "hook": "mlp", "context": 64, "keep_special_tokens": False,
             "inputs": {"text": "hf:stanford/tiny"}}  # fmt: skip
    folder = store.folder_of(str(root), "gpt2")
    places = (np.zeros(3000, np.int32), np.zeros(3000, np.int32), np.arange(3000, dtype=np.int32))
    rows = store.Rows(x, *places)
    store.write({0: store.Writer(folder, 16, facts)}, lambda start: [(0, {0: rows})])
    runs = {}
    for name, path in (("file", f"{root}/{SECRET}.npy"), ("dataset", str(folder))):
        config = base()
        config.sae.n_features, config.sae.k, config.data.path = 32, 4, path
        config.train.steps, config.train.batch_size, config.train.devices = 2, 32, 1
        config.eval.n_tokens, config.eval.batch_size = 500, 200
        train(config, str(root / name))
        runs[name] = str(root / name)
    return runs


@pytest.mark.parametrize("format", list(formats.FORMATS))
@pytest.mark.parametrize("name", ["file", "dataset"])
def test_no_path_is_in_any_byte_of_an_export(run, tmp_path, monkeypatch, name, format):
    monkeypatch.chdir(Path(run[name]).parent)  # where names without folders are there too
    sharing.export(run[name], str(tmp_path / "out"), format)
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert len(files) > 3
    assert not [file for file, content in files.items() if SECRET.encode() in content]
    sharing.export(str(tmp_path / "out"), str(tmp_path / "again"), format)
    assert not [p for p in (tmp_path / "again").iterdir() if SECRET.encode() in p.read_bytes()]


def test_paths_in_others_metadata_stay_as_well(tmp_path):
    found = origin.public({
        "dataset_path": "/data/x", "cache": "~/x", "here": "./x", "there": "C:\\x", "bucket": "gs://a/b", "kept": "a/b",
        "hub": "hf:a/b", "link": "https://a.org/b", "deep": {"list": ["/data/x", "kept", {"path": str(tmp_path)}]},
    })  # fmt: skip
    assert found == {
        "kept": "a/b", "hub": "hf:a/b", "link": "https://a.org/b", "deep": {"list": ["kept", {}]},
    }  # fmt: skip


def test_what_a_dataset_of_before_does_not_say_is_what_it_then_was():
    found = origin.of_run(base(), {"id": "openai-community/gpt2", "layer": 4})
    assert found == {
        "model_name": "openai-community/gpt2", "hook_name": "blocks.3.hook_resid_post", "layer": 3,
        "context_size": None, "prepend_bos": True, "exclude_special_tokens": True, "dataset_path": "",
    }  # fmt: skip


def test_each_library_gets_its_own_spelling_from_the_dataset(run, tmp_path):
    for format in formats.FORMATS:
        sharing.export(run["dataset"], str(tmp_path / format), format)
    metadata = json.loads((tmp_path / "saelens/cfg.json").read_text())["metadata"]
    assert metadata["model_name"] == "openai-community/gpt2"
    assert (metadata["hook_name"], metadata["layer"]) == ("blocks.3.hook_mlp_out", 3)
    assert (metadata["context_size"], metadata["dataset_path"]) == (64, "stanford/tiny")
    assert (metadata["prepend_bos"], metadata["exclude_special_tokens"]) == (True, True)
    config = json.loads((tmp_path / "dictionary_learning/config.json").read_text())
    assert (config["trainer"]["submodule_name"], config["trainer"]["layer"]) == ("mlp_out_layer_3", 3)
    assert (config["trainer"]["lm_name"], config["buffer"]["ctx_len"]) == ("openai-community/gpt2", 64)
    assert json.loads((tmp_path / "sparsify/metadata.json").read_text())["hookpoint"] == "layers.3.mlp"
    config = json.loads((tmp_path / "sparsify/cfg.json").read_text())
    assert config["expansion_factor"] == config["num_latents"] // config["d_in"] > 1
    for format in formats.FORMATS:  # and what comes back is one
        found = sharing.load(str(tmp_path / format)).metadata
        assert (found["hook_name"], found["layer"]) == ("blocks.3.hook_mlp_out", 3)


@pytest.mark.parametrize(("given", "lens", "dictionary", "plain"), [
    ("resid_post_layer_3", "blocks.3.hook_resid_post", "resid_post_layer_3", "layers.3"),
    ("model.layers.12", "blocks.12.hook_resid_post", "resid_post_layer_12", "layers.12"),
    ("transformer.h.5.mlp", "blocks.5.hook_mlp_out", "mlp_out_layer_5", "layers.5.mlp"),
    ("layers.2.self_attn", "blocks.2.hook_attn_out", "attention_out_layer_2", "layers.2.self_attn"),
    ("blocks.0.hook_resid_pre", "blocks.0.hook_resid_pre", "resid_pre_layer_0", "blocks.0.hook_resid_pre"),
    ("blocks.7.attn.hook_z", "blocks.7.attn.hook_z", "blocks.7.attn.hook_z", "blocks.7.attn.hook_z"),
    ("somewhere", "somewhere", "somewhere", "somewhere"),
])  # fmt: skip
def test_spellings(given, lens, dictionary, plain):
    assert origin.canonical(given) == lens
    assert origin.canonical(lens) == lens
    assert origin.spelled(lens, "dictionary_learning") == dictionary
    assert origin.spelled(lens, "sparsify") == plain


def test_what_is_said_on_the_command_line_counts(run, tmp_path, capsys):
    command = ["export", f"--workdir={run['file']}", f"--out={tmp_path}/out", "--model_name=gpt2-small",
               "--hook_name=resid_post_layer_3", "--noprepend_bos", "--context_size=128"]  # fmt: skip
    assert cli.main(command) == 0
    metadata = json.loads((tmp_path / "out/cfg.json").read_text())["metadata"]
    assert metadata["prepend_bos"] is False
    assert {key: metadata[key] for key in ("model_name", "hook_name", "layer", "context_size")} == {
        "model_name": "gpt2-small", "hook_name": "blocks.3.hook_resid_post", "layer": 3, "context_size": 128,
    }  # fmt: skip
    assert "`gpt2-small`, `blocks.3.hook_resid_post`" in (tmp_path / "out/README.md").read_text()
    capsys.readouterr()
    assert cli.main(command) == 0  # its own output: nothing to do
    assert "there already" in capsys.readouterr().out
    assert cli.main([*command, "--layer=4"]) == 2
    assert "--layer = 4: 3, which blocks.3.hook_resid_post names" in capsys.readouterr().err
    assert cli.main([*command[:-1], "--context_size=64"]) == 2
    assert "--out = " in capsys.readouterr().err
    assert json.loads((tmp_path / "out/cfg.json").read_text())["metadata"] == metadata


@pytest.mark.parametrize(("said", "field"), [
    ({"layer": -1}, "--layer"), ({"context_size": 0}, "--context_size"), ({"hook_name": ""}, "--hook_name"),
    ({"layer": 2, "hook_name": "layers.1"}, "--layer"),
])  # fmt: skip
def test_what_cannot_be_is_refused(said, field):
    with pytest.raises(Refused) as error:
        origin.described({}, said)
    assert error.value.field == field


def test_the_least_that_can_be_said_is_taken():
    said = {"layer": 0, "context_size": 1, "hook_name": "layers.0"}
    assert origin.described({}, said) == said | {"hook_name": "blocks.0.hook_resid_post"}


@pytest.mark.parametrize(("layer", "hook", "named", "block"), [
    (0, "residual", "blocks.0.hook_resid_pre", 0), (1, "residual", "blocks.0.hook_resid_post", 0),
    (4, "residual", "blocks.3.hook_resid_post", 3), (2, "attention", "blocks.1.hook_attn_out", 1),
    (1, "mlp", "blocks.0.hook_mlp_out", 0), (3, "mlp.act", "layers.2.mlp.act", 2),
])  # fmt: skip
@pytest.mark.parametrize("special", [True, False])
def test_a_layer_here_is_the_stream_after_so_many_blocks(layer, hook, named, block, special):
    config = base({"data.model.id": "o/m", "data.model.layer": layer, "data.model.hook": hook,
                   "data.model.text": "hf:o/texts", "data.model.keep_special_tokens": special})  # fmt: skip
    found = origin.of_run(config, {})
    assert (found["model_name"], found["hook_name"], found["layer"]) == ("o/m", named, block)
    assert found["exclude_special_tokens"] is not special
    assert found["dataset_path"] == "o/texts"
    told = origin.of_run(config, {"inputs": {"text": "hf:o/others"}, "layer": layer + 1})
    assert (told["dataset_path"], told["layer"]) == ("o/others", layer)


def test_a_file_says_of_itself_what_no_configuration_does():
    """The model of the configuration is not that of a file; a hook point of any spelling says its layer."""
    config = base({"data.model.id": "o/m", "data.path": "x.npy"})
    assert origin.of_run(config, {}) == {}
    imported = {"imported": {"hook": "model.layers.7.mlp", "context": 32}}
    assert origin.of_run(config, imported) == {"hook_name": "blocks.7.hook_mlp_out", "layer": 7, "context_size": 32}


@pytest.mark.parametrize(("key", "value", "local"), [
    ("note", "gs://bucket/x", True), ("note", "http://a.org", False), ("note", "https://a.org", False),
    ("note", "hf:o/d", False), ("data.path", "x", True), ("note", "../x", True), ("note", "~/x", True),
    ("note", "D:/x", True), ("note", "..x", False), ("note", "", False), ("note", 3, False),
    ("model_name", "there", True), ("model_name", "gone", False), ("note", "there", False), ("path", "x" * 2000, False),
])  # fmt: skip
def test_what_is_of_this_machine_is_told_by_its_form_or_because_it_is_there(tmp_path, monkeypatch, key, value, local):
    monkeypatch.chdir(tmp_path)
    Path("there").write_text("")
    assert origin.is_local(key, value) is local


def test_a_layer_stays_unless_its_hook_point_goes():
    held = {"layer": 3, "hook_name": "my.own.hook"}
    assert origin.described(held, {"dataset": "d"}) == {**held, "dataset": "d"}
    assert origin.described(held, {"hook_name": "x", "layer": 5}) == {"hook_name": "x", "layer": 5}


def test_a_layer_of_another_hook_point_is_forgotten():
    assert origin.described({"layer": 3, "hook_name": "blocks.3.hook_resid_post"}, {"hook_name": "x"}) == {
        "hook_name": "x"
    }


def test_a_card_lists_what_applied(run, tmp_path):
    sharing.export(run["file"], str(tmp_path / "out"))
    card, _, settings = (tmp_path / "out/README.md").read_text().partition("## Settings")
    assert "Scaling, centring and whitening are folded into the weights" in card
    assert "Each token goes through" not in card
    assert "`train.steps=2`" in settings
    assert "`data.statistics_tokens=" in settings
    for key in ("data.model.", "data.gamma", "data.rank", "data.path", "checkpoint.", "auxk.weight=-1",
                "auxk.dead_after_tokens=0"):  # fmt: skip
        assert key not in settings
    none = origin.applied({"auxk.preset": "none", "data.signal": "sparse", "data.path": "", "data.model.id": "",
                           "data.rank": 0, "data.gamma": 2.0, "train.steps": 5, "train.batch_size": 8,
                           "sae.balance": True, "sae.whiten": False})  # fmt: skip
    assert none == {"auxk.preset": "none", "data.signal": "sparse", "data.gamma": 2.0, "train.steps": 5,
                    "train.batch_size": 8, "sae.balance": True}  # fmt: skip


def test_the_autopsy_of_a_run_says_when_a_feature_last_fired(run, tmp_path):
    x = np.load(Path(run["file"]).parent / f"{SECRET}.npy")
    autopsy.dissect(run["file"], x, str(tmp_path), n_probes=16)
    with open(tmp_path / "features.csv") as file:
        found = [int(row["tokens_since_fired"]) for row in csv.DictReader(file)]
    assert found == checkpoint.saved(run["file"]).groups[0]["tokens_since_fired"][0].tolist()
    assert set(found) <= {0, 32, 64}
    assert "tokens since fired" in (tmp_path / "report.html").read_text()
