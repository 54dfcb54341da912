"""Files of every library and release: read as that library reads them, told apart, or refused in plain words."""

import json
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from etils import epath
from safetensors.torch import load_file, save_file
from test_encoders import D, K, N, check, weights

from sae_jax import SAE, cli
from sae_jax.errors import Refused
from sae_jax.exchange import arrays, encoders, hub, registry, sharing
from sae_jax.exchange.encoders import Opened

relu, linear = torch.relu, torch.nn.functional.linear


@pytest.fixture(scope="module")
def x():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(800, D)) * np.geomspace(1, 0.3, D)
    return np.float32(x + 2 * rng.normal(size=D))


def kept(z, k):
    """The k largest of each row."""
    top = z.topk(k, dim=-1)
    return torch.zeros_like(z).scatter_(-1, top.indices, top.values)


def acts_of(opened: Opened, x):
    return np.asarray(encoders.encode(jax.tree.map(jnp.asarray, opened.encoder), jnp.asarray(x)))


def same(opened, x, theirs):
    theirs = theirs.detach().numpy()
    assert 0 < (theirs > 0).any(axis=0).sum() < N
    np.testing.assert_allclose(acts_of(opened, x), theirs, atol=2e-5 * np.abs(theirs).max())


# -- dictionary_learning: `encode` of each class, as dictionary.py and trainers/*.py of 0.1.0 have it ---------------

LINEAR = {"encoder.weight": (N, D), "encoder.bias": (N,), "decoder.weight": (D, N)}
COLUMNS = {"W_enc": (D, N), "b_enc": (N,), "W_dec": (N, D), "b_dec": (D,)}
CLASSES = {
    "AutoEncoder": ({**LINEAR, "bias": (D,)}, lambda w, x: relu(linear(x - w["bias"], w["encoder.weight"],
                                                                        w["encoder.bias"]))),
    "AutoEncoderNew": ({**LINEAR, "decoder.bias": (D,)}, lambda w, x: relu(linear(x, w["encoder.weight"],
                                                                                   w["encoder.bias"]))),
    "AutoEncoderTopK": ({**LINEAR, "b_dec": (D,), "k": (), "threshold": ()}, lambda w, x: kept(relu(linear(
        x - w["b_dec"], w["encoder.weight"], w["encoder.bias"])), K)),
    "BatchTopKSAE": ({**LINEAR, "b_dec": (D,), "k": (), "threshold": ()}, lambda w, x: (lambda z: z * (
        z > w["threshold"]))(relu(linear(x - w["b_dec"], w["encoder.weight"], w["encoder.bias"])))),
    "MatryoshkaBatchTopKSAE": ({**COLUMNS, "k": (), "threshold": (), "group_sizes": (2,)}, lambda w, x: (lambda z: z * (
        z > w["threshold"]))(relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]))),
    "JumpReluAutoEncoder": ({**COLUMNS, "threshold": (N,)}, lambda w, x: (lambda z: relu(z * (
        z > w["threshold"])))(x @ w["W_enc"] + w["b_enc"])),
    "GatedAutoEncoder": (
        {"encoder.weight": (N, D), "decoder.weight": (D, N), "decoder_bias": (D,), "r_mag": (N,), "gate_bias": (N,),
         "mag_bias": (N,)},
        lambda w, x: (lambda u: (u + w["gate_bias"] > 0) * relu(w["r_mag"].exp() * u + w["mag_bias"]))(
            linear(x - w["decoder_bias"], w["encoder.weight"])),
    ),
}  # fmt: skip


def dictionary(folder, kind, config=True, k_in_file=True, **more):
    state = weights(CLASSES[kind][0])
    if "k" in state:
        state["k"] = torch.tensor(K, dtype=torch.int)
    if not k_in_file:
        del state["k"]
    if "group_sizes" in state:
        state["group_sizes"] = torch.tensor([N // 4, N - N // 4])
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "ae.pt")
    trainer = {"dict_class": kind, "activation_dim": D, "dict_size": N, "layer": 3, "lm_name": "a/b", **more}
    if config:
        (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
    return state


@pytest.mark.parametrize("kind", CLASSES)
def test_every_class_of_dictionary_learning(x, tmp_path, kind):
    state = dictionary(tmp_path / "d", kind, k=K)
    encode = CLASSES[kind][1]
    opened = registry.read(epath.Path(tmp_path / "d"))
    same(opened, x, encode(state, torch.from_numpy(x)))
    assert opened.metadata == {"model_name": "a/b", "layer": 3, "context_size": 128}
    bias = next(key for key in ("bias", "b_dec", "decoder_bias", "decoder.bias") if key in state)
    subtracted = kind not in ("AutoEncoderNew", "JumpReluAutoEncoder")
    b_dec, mean = state[bias].numpy(), x.mean(axis=0, dtype=np.float64)
    tokens = torch.from_numpy(x)
    acts = encode(state, tokens).numpy()
    moved = encode(state, tokens - torch.from_numpy(np.float32(mean - b_dec * subtracted))).numpy()
    W_enc = state["W_enc"] if "W_enc" in state else state["encoder.weight"].T
    b_enc = next(state[key] for key in ("encoder.bias", "b_enc", "gate_bias") if key in state)
    z_pre = ((tokens - torch.from_numpy(b_dec) * subtracted) @ W_enc + b_enc).numpy()
    W_dec = state["W_dec"] if "W_dec" in state else state["decoder.weight"].T
    check((tmp_path / "d", x), x, acts, z_pre, moved, W_dec.numpy(), b_dec, b_dec * subtracted)


@pytest.mark.parametrize("kind", CLASSES)
def test_without_a_config_a_class_is_told_by_its_keys_or_refused(x, tmp_path, kind):
    state = dictionary(tmp_path / "d", kind, config=False)
    if kind in ("AutoEncoderTopK", "BatchTopKSAE"):
        with pytest.raises(Refused, match="AutoEncoderTopK or BatchTopKSAE: their files look alike"):
            registry.read(epath.Path(tmp_path / "d"))
        return
    same(registry.read(epath.Path(tmp_path / "d")), x, CLASSES[kind][1](state, torch.from_numpy(x)))


def test_k_in_the_config_alone_and_k_that_disagrees(x, tmp_path):
    state = dictionary(tmp_path / "old", "AutoEncoderTopK", k_in_file=False, k=K)
    same(registry.read(epath.Path(tmp_path / "old")), x, CLASSES["AutoEncoderTopK"][1](state, torch.from_numpy(x)))
    dictionary(tmp_path / "other", "AutoEncoderTopK", k=K + 1)
    with pytest.raises(Refused, match=f"k = {K}: the k of config.json, {K + 1}"):
        registry.read(epath.Path(tmp_path / "other"))
    dictionary(tmp_path / "none", "AutoEncoderTopK", k_in_file=False)
    with pytest.raises(Refused, match="k = 'missing'"):
        registry.read(epath.Path(tmp_path / "none"))


@pytest.mark.parametrize("kind", ["AutoEncoder", "AutoEncoderNew"])
@pytest.mark.parametrize("long", [True, False])
def test_files_of_interplm_say_whether_tokens_are_normed(x, tmp_path, kind, long):
    """As its ReLUSAE and ReLUSAE_Tied encode, each feature in the encoder's own units."""
    state = dictionary(tmp_path / "d", kind, config=False)
    more = {"activation_rescale_factor": 7 * torch.ones(N), "normalize_to_sqrt_d": torch.tensor(long)}
    torch.save(state | more, tmp_path / "d/ae_normalized.pt")
    opened = registry.read(epath.Path(tmp_path / "d/ae_normalized.pt"))
    tokens = torch.from_numpy(x)
    tokens = torch.nn.functional.normalize(tokens, dim=-1) * D**0.5 if long else tokens
    theirs = CLASSES[kind][1](state, tokens).numpy()
    ours = np.asarray(encoders.encode(jax.tree.map(jnp.asarray, opened.encoder),
                                      encoders.NORMS[opened.encoder.norm](jnp.asarray(x))))  # fmt: skip
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())
    assert not opened.notes


@pytest.mark.parametrize("extra", [{"k": torch.tensor(8)}, {"k": 8}, {"log_feature_scale": torch.zeros(N)}], ids=str)
def test_a_class_that_was_guessed_has_no_other_keys_and_one_that_is_named_says_them(x, tmp_path, extra):
    """A TopK SAE whose encoder and decoder are linear layers has the keys of AutoEncoderNew, and k."""
    state = dictionary(tmp_path / "d", "AutoEncoderNew", config=False) | extra
    torch.save(state, tmp_path / "d/ae.pt")
    key = next(iter(extra))
    guessed = f"ae.pt: {key} = 'unexpected': encoder.weight, .* alone, by which it would be of AutoEncoderNew"
    for path in ("d", "d/ae.pt"):
        with pytest.raises(Refused, match=guessed):
            registry.read(epath.Path(tmp_path / path))
    dictionary(tmp_path / "d", "AutoEncoderNew")
    torch.save(state, tmp_path / "d/ae.pt")
    if key == "k":  # it decides what fires
        with pytest.raises(Refused, match=guessed):
            registry.read(epath.Path(tmp_path / "d"))
        return
    opened = registry.read(epath.Path(tmp_path / "d"))
    assert [f"also has {key}, which nothing here looks at" in note for note in opened.notes] == [True]
    same(opened, x, CLASSES["AutoEncoderNew"][1](state, torch.from_numpy(x)))


@pytest.mark.parametrize(("trainer", "said"), [
    ({"k": 8}, "trainer.k = 8: a trainer.dict_class too: the keys of the weights are those of AutoEncoderNew"),
    ({"trainer_class": "TopKTrainer"}, "trainer.trainer_class = 'TopKTrainer': a trainer.dict_class too"),
    ({"dict_class": ["AutoEncoderNew"]}, "one of AutoEncoder, AutoEncoderNew"),
])  # fmt: skip
def test_a_configuration_that_speaks_of_another_class_is_not_passed_over(tmp_path, trainer, said):
    dictionary(tmp_path / "d", "AutoEncoderNew", config=False)
    (tmp_path / "d/config.json").write_text(json.dumps({"trainer": trainer}))
    with pytest.raises(Refused, match=said):
        registry.read(epath.Path(tmp_path / "d"))


def test_numbers_beside_tensors_are_read_as_they_are(x, tmp_path):
    """k of the file against that of its configuration; a norm of tokens; keys that are no words."""
    state = dictionary(tmp_path / "d", "AutoEncoderTopK", k=K + 1)
    torch.save(state | {"k": K}, tmp_path / "d/ae.pt")
    with pytest.raises(Refused, match=f"k = {K}: the k of config.json, {K + 1}"):
        registry.read(epath.Path(tmp_path / "d"))
    state = dictionary(tmp_path / "e", "AutoEncoder", config=False)
    torch.save(state | {"normalize_to_sqrt_d": True}, tmp_path / "e/ae.pt")
    assert registry.read(epath.Path(tmp_path / "e")).encoder.norm == "constant_norm_rescale"
    torch.save(state | {"normalize_to_sqrt_d": torch.ones(2)}, tmp_path / "e/ae.pt")
    with pytest.raises(Refused, match="normalize_to_sqrt_d = .2,.: the shape"):
        registry.read(epath.Path(tmp_path / "e"))
    torch.save(state | {number: torch.zeros(1) for number in range(20)} | {"z": "?"}, tmp_path / "e/ae.pt")
    with pytest.raises(Refused, match=r"0, 1, 10, .* … \(21 in all\) = 'unexpected'"):
        registry.read(epath.Path(tmp_path / "e"))


@pytest.mark.parametrize(("names", "kind"), [
    ("encoder_linear.weight encoder_linear.bias decoder_linear.weight decoder_linear.bias", "Goodfire"),
    ("encoder.weight latent_bias decoder.weight pre_bias", "OpenAI"),
])  # fmt: skip
@pytest.mark.parametrize("extra", [{"k": K}, {"threshold": torch.ones(N)}], ids=str)
def test_files_told_by_their_keys_have_no_others(tmp_path, names, kind, extra):
    shapes = dict(zip(names.split(), [(N, D), (N,), (D, N), (D,)], strict=True))
    torch.save(weights(shapes), tmp_path / "x.pt")
    assert registry.read(epath.Path(tmp_path / "x.pt")).encoder.rule == "relu"
    torch.save(weights(shapes) | extra, tmp_path / "x.pt")
    with pytest.raises(Refused, match=f"{next(iter(extra))} = 'unexpected': .* by which it would be of {kind}"):
        registry.read(epath.Path(tmp_path / "x.pt"))


@pytest.mark.parametrize(("format", "file"), [("saelens", "sae_weights.safetensors"), ("sparsify", "sae.safetensors")])
def test_an_array_that_nothing_looks_at_is_named(tmp_path, format, file):
    rows = np.eye(N, D, dtype=np.float32)
    sae = SAE(W_enc=rows, b_enc=np.zeros(N, np.float32), W_dec=rows, b_dec=np.zeros(D, np.float32), k=K)
    sharing.export(sae, str(tmp_path / "d"), format)
    assert registry.read(epath.Path(tmp_path / "d")).notes == ()
    save_file(load_file(tmp_path / "d" / file) | {"W_skip": torch.zeros(D, D)}, tmp_path / "d" / file)
    assert ["also has W_skip" in note for note in registry.read(epath.Path(tmp_path / "d")).notes] == [True]


def test_of_a_repository_no_more_is_fetched_than_an_sae_needs():
    files = ["README.md", "a/b/config.json", "layer_3/cfg.json", "layer_3/W_enc_0.npz", "layer_3/W_dec_0.npz",
             "layer_3/W_enc_1.npz"]  # fmt: skip
    assert hub._needed(files, ["layer_3/W_enc_0.npz"], "") == ["README.md"]
    assert hub._needed(files, ["layer_3/W_enc_0.npz"], "a/b") == ["a/b/*"]
    wanted = ["layer_3/cfg.json", "layer_3/W_enc_0.npz", "layer_3/W_dec_0.npz"]
    assert hub._needed(files, ["layer_3/W_enc_0.npz"], "layer_3/W_enc_0.npz") == wanted


# -- sparsify --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {}, {"activation": "groupmax", "k": 6}, {"transcode": True}, {"skip_connection": True, "transcode": True},
    {"skip_connection": True}, {"signed": True}, {"num_latents": 0, "expansion_factor": N // D},
], ids=str)  # fmt: skip
def test_every_kind_of_sparsify(x, tmp_path, options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sparsify import SparseCoder, SparseCoderConfig
    config = {"num_latents": N, "k": K, "normalize_decoder": False, **options}
    signed = config.pop("signed", False)
    coder = SparseCoder(D, SparseCoderConfig(**config))
    coder.load_state_dict(weights({key: tuple(value.shape) for key, value in coder.state_dict().items()}))
    coder.save_to_disk(tmp_path / "s")
    if signed:  # of its first versions: the k largest in absolute value
        where = tmp_path / "s/cfg.json"
        where.write_text(json.dumps({**json.loads(where.read_text()), "signed": True}))
    tokens = torch.from_numpy(x)

    def encode(tokens):
        z = linear(tokens if coder.cfg.transcode else tokens - coder.b_dec, coder.encoder.weight, coder.encoder.bias)
        if signed:
            top = z.abs().topk(K, dim=-1).indices
            return torch.zeros_like(z).scatter_(-1, top, z.gather(-1, top)), z.abs()
        out = coder.encode(tokens)
        return torch.zeros_like(z).scatter_(-1, out.top_indices, out.top_acts), z

    with torch.no_grad():
        acts, z_pre = encode(tokens)
        b_in = torch.zeros(D) if coder.cfg.transcode else coder.b_dec
        moved = encode(tokens - tokens.mean(dim=0) + b_in)[0]
        np.testing.assert_allclose(acts_of(registry.read(epath.Path(tmp_path / "s")), x), acts.numpy(), atol=2e-4)
        skip = 0 if coder.W_skip is None or coder.cfg.transcode else tokens @ coder.W_skip.mT
    if options == {"skip_connection": True}:
        return  # what is explained is then x less the skip connection: `check` has another denominator
    assert skip == 0
    check((tmp_path / "s", x), x, acts.numpy(), z_pre.numpy(), moved.numpy(), coder.W_dec.detach().numpy(),
          coder.b_dec.detach().numpy(), b_in.detach().numpy(), transcodes=coder.cfg.transcode)  # fmt: skip


# -- releases with layouts of their own ------------------------------------------------------------------------------


def arrays_of(shapes):
    return {key: value.numpy() for key, value in weights(shapes).items()}


def gemma_1(folder):
    folder.mkdir()
    w = arrays_of({**COLUMNS, "threshold": (N,)})
    np.savez(folder / "params.npz", **w)
    return folder, lambda x: jump(x @ w["W_enc"] + w["b_enc"], w["threshold"])


def gemma_1_embedding(folder):
    (folder / "embedding/width_4k").mkdir(parents=True)
    w = arrays_of({**COLUMNS, "threshold": (N,)})
    np.savez(folder / "embedding/width_4k/params.npz", **w)
    return folder / "embedding/width_4k", lambda x: jump(x @ w["W_enc"] / D**0.5 + w["b_enc"], w["threshold"])


def gemma_2(folder, dtype=torch.float32, **more):
    folder.mkdir()
    shapes = {**{key.lower(): shape for key, shape in COLUMNS.items()}, "threshold": (N,), **more}
    w = {key: value.to(dtype) for key, value in weights({k: s for k, s in shapes.items() if k != "b"}).items()}
    save_file(w, folder / "params.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "jump_relu", "hf_hook_point_in": "in"}))
    w = {key: value.float().numpy() for key, value in w.items()}
    return folder, lambda x: jump(x @ w["w_enc"] + w["b_enc"], w["threshold"])


def qwen(folder):
    folder = folder / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_5"
    folder.mkdir(parents=True)
    w = weights({"W_enc": (N, D), "W_dec": (D, N), "b_enc": (N,), "b_dec": (D,)})
    torch.save(w, folder / "layer7.sae.pt")
    return folder / "layer7.sae.pt", lambda x: kept(relu(linear(x, w["W_enc"], w["b_enc"])), 5)


def llama(folder):
    (folder / "checkpoints").mkdir(parents=True)
    w = weights({**LINEAR, "decoder.bias": (D,)})
    save_file(w, folder / "checkpoints/final.safetensors")
    config = {"d_model": D, "d_sae": N, "jump_relu_threshold": 0.5, "hook_point_in": "blocks.0.hook_resid_post",
              "dataset_average_activation_norm": {"in": 7.0, "out": 7.0}}  # fmt: skip
    (folder / "hyperparams.json").write_text(json.dumps(config))
    s = D**0.5 / 7
    return folder, lambda x: jump((linear(x * s, w["encoder.weight"], w["encoder.bias"])).numpy(), 0.5 * s)


def llama_r1(folder):
    folder.mkdir()
    w = weights({**LINEAR, "decoder.bias": (D,), "log_jumprelu_threshold": (N,)})
    save_file(w, folder / "sae_weights.safetensors")
    config = {"d_model": D, "expansion_factor": N // D, "hook_point_in": "h",
              "dataset_average_activation_norm": {"in": 7.0}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    threshold = w["log_jumprelu_threshold"].exp().numpy()
    return folder, lambda x: jump(
        linear(x * D**0.5 / 7, w["encoder.weight"], w["encoder.bias"]).numpy(), threshold
    )


def openai(folder, activation="TopK"):
    folder.mkdir()
    w = weights({"encoder.weight": (N, D), "decoder.weight": (D, N), "latent_bias": (N,), "pre_bias": (D,)})
    w["latent_bias"][: N // 4] -= 12
    state = {**w, "stats_last_nonzero": torch.zeros(N, dtype=torch.long), "activation": activation}
    torch.save(state | ({"activation_state_dict": {"k": K, "postact_fn": "ReLU"}} if activation == "TopK" else {}),
               folder / "autoencoder.pt")  # fmt: skip

    def encode(x):
        if activation == "TopK":
            x = x - x.mean(dim=-1, keepdim=True)
            x = x / (x.std(dim=-1, keepdim=True) + 1e-5)
        z = linear(x - w["pre_bias"], w["encoder.weight"], w["latent_bias"])
        return relu(kept(z, K)) if activation == "TopK" else relu(z)

    return folder, encode


def goodfire(folder):
    folder.mkdir()
    w = weights({"encoder_linear.weight": (N, D), "encoder_linear.bias": (N,), "decoder_linear.weight": (D, N),
                 "decoder_linear.bias": (D,)})  # fmt: skip
    w["encoder_linear.bias"][: N // 4] -= 12
    torch.save(w, folder / "Llama-SAE-l19.pth")
    return folder / "Llama-SAE-l19.pth", lambda x: relu(linear(x, w["encoder_linear.weight"], w["encoder_linear.bias"]))


def deepseek(folder):
    folder.mkdir()
    w = {key: value.bfloat16() for key, value in weights({**LINEAR, "decoder.bias": (D,)}).items()}
    torch.save(w, folder / "SAE-l19.pt")
    w = {key: value.float() for key, value in w.items()}
    return folder / "SAE-l19.pt", lambda x: relu(linear(x, w["encoder.weight"], w["encoder.bias"]))


def attention(folder):
    folder.mkdir()
    w = weights(COLUMNS)
    torch.save(w, folder / "gpt2_L0_v9.pt")
    (folder / "gpt2_L0_v9_cfg.json").write_text(json.dumps({"act_size": D, "dict_size": N, "act_name": "z"}))
    return folder / "gpt2_L0_v9.pt", lambda x: relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"])


def transcoder(folder):
    folder.mkdir()
    w = weights({"W_enc": (N, D), "W_dec": (N, D), "b_enc": (N,), "b_dec": (D,)})
    save_file(w, folder / "layer_3.safetensors")
    return folder / "layer_3.safetensors", lambda x: relu(linear(x, w["W_enc"], w["b_enc"]))


def cross_layer(folder):
    folder.mkdir()
    w = weights({"W_enc_2": (N, D), "b_enc": (N,), "b_dec_2": (D,), "W_dec_2": (N, 4, D)})
    w["b_enc_2"] = w.pop("b_enc")
    decoders = {"W_dec_2": w.pop("W_dec_2")}
    save_file(w, folder / "W_enc_2.safetensors")
    save_file(decoders, folder / "W_dec_2.safetensors")
    return folder / "W_enc_2.safetensors", lambda x: relu(linear(x, w["W_enc_2"], w["b_enc_2"]))


def jump(z, threshold):
    z = np.asarray(z)
    return torch.from_numpy(np.maximum(z, 0) * (z > threshold))


RELEASES = {
    "gemma scope 1": gemma_1, "its embeddings": gemma_1_embedding, "gemma scope 2": gemma_2,
    "in bfloat16": lambda folder: gemma_2(folder, torch.bfloat16),
    "affine transcoder": lambda folder: gemma_2(folder, affine_skip_connection=(D, D)),
    "cross-layer of gemma scope 2": lambda folder: gemma_2(folder, w_dec=(N, 3, D)),
    "qwen scope": qwen, "llama scope": llama, "llama scope r1": llama_r1, "openai topk": openai,
    "openai relu": lambda folder: openai(folder, "ReLU"), "goodfire": goodfire, "deepseek": deepseek,
    "attention": attention, "transcoder": transcoder, "cross-layer": cross_layer,
}  # fmt: skip


@pytest.mark.parametrize("release", RELEASES)
def test_releases_with_a_layout_of_their_own(x, tmp_path, release):
    path, encode = RELEASES[release](tmp_path / "r")
    tokens = torch.from_numpy(x)
    theirs = encode(x if "gemma" in release or release in ("its embeddings", "in bfloat16", "affine transcoder")
                    else tokens)  # fmt: skip
    opened = registry.read(epath.Path(path))
    same(opened, x, theirs)
    transcodes = release in ("affine transcoder", "cross-layer of gemma scope 2", "transcoder", "cross-layer")
    assert opened.encoder.transcodes == transcodes
    if not path.is_dir():  # the folder of a single file is that file
        same(registry.read(epath.Path(path.parent)), x, theirs)


def test_decoders_of_a_cross_layer_transcoder_are_summed_and_a_skip_is_turned(tmp_path):
    folder, _ = gemma_2(tmp_path / "g", w_dec=(N, 3, D), affine_skip_connection=(D, D))
    held, encoder = load_file(folder / "params.safetensors"), registry.read(epath.Path(folder)).encoder
    np.testing.assert_allclose(encoder.W_dec, held["w_dec"].sum(dim=1), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(encoder.W_skip, held["affine_skip_connection"].T)
    path, _ = cross_layer(tmp_path / "c")
    decoders = load_file(tmp_path / "c/W_dec_2.safetensors")["W_dec_2"]
    np.testing.assert_allclose(registry.read(epath.Path(path)).encoder.W_dec, decoders.sum(dim=1), rtol=1e-6, atol=1e-6)


# What a release makes of x̂ = W_decᵀ acts + b_dec, for activations as they are: which array, transposed or not, times.
DECODERS = {
    "gemma scope 1": ("params.npz", "W_dec", "b_dec", False, 1, 1),
    "its embeddings": ("embedding/width_4k/params.npz", "W_dec", "b_dec", False, D**0.5, 1),
    "gemma scope 2": ("params.safetensors", "w_dec", "b_dec", False, 1, 1),
    "qwen scope": ("SAE-Res-Qwen3-1.7B-Base-W32K-L0_5/layer7.sae.pt", "W_dec", "b_dec", True, 1, 1),
    "llama scope": ("checkpoints/final.safetensors", "decoder.weight", "decoder.bias", True, 7 / D**0.5, 7 / D**0.5),
    "llama scope r1": ("sae_weights.safetensors", "decoder.weight", "decoder.bias", True, 7 / D**0.5, 7 / D**0.5),
    "openai topk": ("autoencoder.pt", "decoder.weight", "pre_bias", True, 1, 1),
    "goodfire": ("Llama-SAE-l19.pth", "decoder_linear.weight", "decoder_linear.bias", True, 1, 1),
    "attention": ("gpt2_L0_v9.pt", "W_dec", "b_dec", False, 1, 1),
    "transcoder": ("layer_3.safetensors", "W_dec", "b_dec", False, 1, 1),
}  # fmt: skip


@pytest.mark.parametrize("release", DECODERS)
def test_releases_decode_into_the_units_of_the_activations(tmp_path, release):
    """Those trained on scaled tokens scale back; and the file that is the SAE reads as its folder does."""
    path, _ = RELEASES[release](tmp_path / "r")
    name, weight, bias, turned, size, bias_size = DECODERS[release]
    file = tmp_path / "r" / name
    held = (np.load(file) if file.suffix == ".npz" else load_file(file) if file.suffix == ".safetensors"
            else torch.load(file, weights_only=True))  # fmt: skip
    for where in {path, file}:
        encoder = registry.read(epath.Path(where)).encoder
        W_dec = np.asarray(held[weight])
        np.testing.assert_allclose(encoder.W_dec, (W_dec.T if turned else W_dec) * size, rtol=1e-6)
        np.testing.assert_allclose(encoder.b_dec, np.asarray(held[bias]) * bias_size, rtol=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if kind not in ("AutoEncoderTopK", "BatchTopKSAE")])
def test_a_class_of_dictionary_learning_under_another_name_is_told_by_its_keys(x, tmp_path, kind):
    state = dictionary(tmp_path, kind, config=False)
    (tmp_path / "ae.pt").rename(tmp_path / "mine.pt")
    opened = registry.read(epath.Path(tmp_path / "mine.pt"))
    assert opened.library == "dictionary_learning"
    same(opened, x, CLASSES[kind][1](state, torch.from_numpy(x)))


@pytest.mark.parametrize("norm", [0.5, 1.0, 14.0])
def test_tokens_of_any_norm_above_zero_may_have_been_scaled(tmp_path, norm):
    folder, _ = llama(tmp_path / "r")
    with_config(folder, "hyperparams.json", dataset_average_activation_norm={"in": norm})
    held = load_file(folder / "checkpoints/final.safetensors")
    encoder = registry.read(epath.Path(folder)).encoder
    np.testing.assert_allclose(encoder.W_enc, held["encoder.weight"].numpy() * D**0.5 / norm, rtol=1e-6)
    np.testing.assert_allclose(encoder.threshold, np.full(N, 0.5 * D**0.5 / norm), rtol=1e-6)


@pytest.mark.parametrize(("threshold", "said"), [
    (-1.0, "Its threshold was never set, so every positive feature fires, as in dictionary_learning."), (0.0, None),
    (0.5, None),
])  # fmt: skip
def test_a_threshold_that_was_never_set_is_said(tmp_path, threshold, said):
    state = dictionary(tmp_path, "BatchTopKSAE")
    torch.save(state | {"threshold": torch.tensor(threshold)}, tmp_path / "ae.pt")
    opened = registry.read(epath.Path(tmp_path))
    assert opened.notes == (() if said is None else (said,))
    np.testing.assert_array_equal(opened.encoder.threshold, np.full(N, threshold, np.float32))


@pytest.mark.parametrize("architecture", ["standard", "topk"])
def test_factors_of_finetuned_saes_of_saelens_go_into_the_decoder(rng, tmp_path, architecture):
    """Of its versions 1 to 5: activations times a factor are decoded; ranking goes by the rows as they are."""
    w = {key: value.numpy() for key, value in weights(COLUMNS).items()}
    config = {"architecture": architecture, "d_in": D, "d_sae": N, "normalize_activations": "none",
              "rescale_acts_by_decoder_norm": architecture == "topk", "k": K, "sae_lens_version": "6.1.0"}  # fmt: skip
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    factor = np.float32(rng.uniform(0.5, 2, size=N))
    factor[::2] = 1

    def read(factor):
        held = {key: torch.from_numpy(value) for key, value in {**w, "scaling_factor": factor}.items()}
        save_file(held, tmp_path / "sae_weights.safetensors")
        return registry.read(epath.Path(tmp_path)).encoder

    encoder = read(factor)
    np.testing.assert_allclose(encoder.W_dec, w["W_dec"] * factor[:, None], rtol=1e-6)
    np.testing.assert_array_equal(read(np.ones(N, np.float32)).W_dec, w["W_dec"])
    if architecture == "topk":
        np.testing.assert_allclose(encoder.ranked_by, np.linalg.norm(w["W_dec"], axis=1), rtol=1e-6)
    else:
        assert encoder.ranked_by is None
    for wrong in (factor[:-1], np.where(np.arange(N) == 3, np.inf, factor).astype(np.float32)):
        with pytest.raises(Refused, match="scaling_factor"):
            read(wrong)


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_saes_of_saelens_saved_in_training_have_one_threshold(x, tmp_path, architecture, rescaled):
    w = weights(COLUMNS) | {"topk_threshold": torch.tensor(0.75)}
    config = {"architecture": architecture, "d_in": D, "d_sae": N, "rescale_acts_by_decoder_norm": rescaled,
              "k": 5.0, "metadata": {"sae_lens_version": "6.1.0"}}  # fmt: skip
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    save_file(w, tmp_path / "sae_weights.safetensors")
    opened = registry.read(epath.Path(tmp_path))
    z = (torch.from_numpy(x) - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    z = z * w["W_dec"].norm(dim=1) if rescaled else z
    same(opened, x, relu(z) * (z > 0.75))
    assert opened.metadata == {}


def test_norms_that_configurations_of_before_call_true_are_not_applied(tmp_path):
    save_file(weights(COLUMNS), tmp_path / "sae_weights.safetensors")
    for given, said in ((True, "expected_average_only_in"), (False, "")):
        (tmp_path / "cfg.json").write_text(json.dumps({"d_in": D, "d_sae": N, "normalize_activations": given}))
        opened = registry.read(epath.Path(tmp_path))
        assert opened.encoder.norm == "none"
        assert [said in note for note in opened.notes] == [True] * bool(said)


def test_a_single_file_goes_through_the_command(x, tmp_path, capsys):
    path, encode = gemma_1(tmp_path / "r")
    np.save(tmp_path / "x.npy", x)
    argv = ["diagnose", f"--sae={path}/params.npz", f"--activations={tmp_path}/x.npy", f"--workdir={tmp_path}/w",
            "--n_probes=16"]  # fmt: skip
    assert cli.main(argv) == 0
    said = capsys.readouterr().out
    assert "JumpReLU, n = 48" in said
    assert "FVE" in said
    report = json.loads((tmp_path / "w/report.json").read_text())
    assert report["dead_total"] == (~(encode(x).numpy() > 0).any(axis=0)).mean()
    assert report["architecture"] == "JumpReLU"
    assert report["k"] is None


# -- what is refused -------------------------------------------------------------------------------------------------


def refused(path) -> str:
    with pytest.raises(Refused) as caught:
        registry.read(epath.Path(path))
    return str(caught.value)


def test_what_is_refused_is_refused_plainly(tmp_path):
    gemma_2(tmp_path / "g")
    (tmp_path / "g/config.json").write_text('{"architecture": "crosscoder"}')
    assert "architecture = 'crosscoder': jump_relu: others are not supported" in refused(tmp_path / "g")
    path, _ = qwen(tmp_path)
    path.rename(tmp_path / "layer7.sae.pt")
    assert "k is there" in refused(tmp_path / "layer7.sae.pt")
    torch.save({"one": torch.zeros(3), "two": torch.zeros(2)}, tmp_path / "model.pt")
    assert "this one has one, two" in refused(tmp_path / "model.pt")
    (tmp_path / "notes.txt").write_text("")
    assert "or a .safetensors, .npz, .pt or .pth file" in refused(tmp_path / "notes.txt")
    assert "there is none of that name" in refused(tmp_path / "nowhere")
    openai(tmp_path / "o")
    state = torch.load(tmp_path / "o/autoencoder.pt", weights_only=True)
    torch.save({**state, "activation": "Identity"}, tmp_path / "o/autoencoder.pt")
    assert "'Identity': TopK or ReLU" in refused(tmp_path / "o")
    llama_r1(tmp_path / "l")
    (tmp_path / "l/config.json").write_text(json.dumps({"d_model": D, "hook_point_in": "h"}))
    assert "saelens:RELEASE/ID knows it" in refused(tmp_path / "l")


def arrays_spoilt(path, **changed):
    """Other arrays under some of a file's names; None takes one out."""
    held = {key: value for key, value in (load_file(path) | changed).items() if value is not None}
    save_file(held, path)


def with_config(folder, name, **changed):
    held = json.loads((folder / name).read_text()) | changed
    (folder / name).write_text(json.dumps({key: value for key, value in held.items() if value is not None}))


SPOILT = {
    "a decoder of another width": (
        gemma_2, lambda f: arrays_spoilt(f / "params.safetensors", w_dec=torch.ones(N, D + 1), b_dec=torch.ones(D + 1)),
        f"w_dec = ({N}, {D + 1}): the width {D} of the encoder"),
    "an encoder that is no matrix": (
        gemma_2, lambda f: arrays_spoilt(f / "params.safetensors", w_enc=torch.ones(D)), f"w_enc = ({D},): a matrix"),
    "no encoder": (gemma_2, lambda f: arrays_spoilt(f / "params.safetensors", w_enc=None), "w_enc = 'missing'"),
    "a skip of other widths": (
        gemma_2, lambda f: arrays_spoilt(f / "params.safetensors", affine_skip_connection=torch.ones(D + 1, D)),
        "the widths of encoder and decoder"),
    "no thresholds of Llama Scope R1": (
        llama_r1, lambda f: arrays_spoilt(f / "sae_weights.safetensors", log_jumprelu_threshold=None),
        "log_jumprelu_threshold among them"),
    "a norm of nothing": (
        llama_r1, lambda f: with_config(f, "config.json", dataset_average_activation_norm={"in": -1.0}),
        "dataset_average_activation_norm.in = -1.0: > 0"),
    "a norm of zero": (
        llama_r1, lambda f: with_config(f, "config.json", dataset_average_activation_norm={"in": 0}),
        "dataset_average_activation_norm.in = 0.0: > 0"),
    "no decoder": (gemma_2, lambda f: arrays_spoilt(f / "params.safetensors", w_dec=None), "w_dec = 'missing'"),
    "a norm in words": (
        llama_r1, lambda f: with_config(f, "config.json", dataset_average_activation_norm={"in": "7"}), "a number"),
    "norms that are none": (
        llama_r1, lambda f: with_config(f, "config.json", dataset_average_activation_norm=[7.0]), "an object"),
    "a width in words": (llama_r1, lambda f: with_config(f, "config.json", d_model="16"), "d_model = '16': an integer"),
    "no decoders": (cross_layer, lambda f: (f / "W_dec_2.safetensors").unlink(), "the decoders beside their encoder"),
    "decoders of one layer": (
        cross_layer, lambda f: arrays_spoilt(f / "W_dec_2.safetensors", W_dec_2=torch.ones(N, D)), "(n, layers, d)"),
    "decoders of another layer": (
        cross_layer, lambda f: arrays_spoilt(f / "W_dec_2.safetensors", W_dec_2=None, W_dec_3=torch.ones(N, 4, D)),
        "W_dec_2 = 'missing'"),
}  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_release_that_lacks_something_is_refused_by_the_name_of_it(tmp_path, spoil):
    release, change, said = SPOILT[spoil]
    path, _ = release(tmp_path / "sae")
    change(tmp_path / "sae")
    assert said in refused(path)


def test_a_norm_that_is_an_array_of_the_file_counts(tmp_path):
    folder, _ = llama_r1(tmp_path / "sae")
    plain = registry.read(epath.Path(folder)).encoder
    with_config(folder, "config.json", dataset_average_activation_norm=None)
    arrays_spoilt(folder / "sae_weights.safetensors", **{"dataset_average_activation_norm.h": torch.tensor([14.0])})
    np.testing.assert_allclose(registry.read(epath.Path(folder)).encoder.W_enc, plain.W_enc / 2, rtol=1e-6)


def test_a_layer_of_gemma_scope_2_by_its_name_and_by_its_arrays(x, tmp_path):
    folder, encode = gemma_2(tmp_path / "g")
    for name in ("layer_3.safetensors", "anything.safetensors"):
        (tmp_path / name).write_bytes((folder / "params.safetensors").read_bytes())
        same(registry.read(epath.Path(tmp_path / name)), x, torch.as_tensor(encode(x)))


def test_a_folder_of_several_lists_them(x, tmp_path):
    for name in ("layer_1/width_16k", "layer_2/width_16k"):
        (tmp_path / name).parent.mkdir()
        gemma_1(tmp_path / name)
    dictionary(tmp_path / "other", "AutoEncoder")
    assert refused(tmp_path).endswith("one of the 3 SAEs in it: layer_1/width_16k, layer_2/width_16k, other")
    for number in range(20):
        torch.save({}, tmp_path / f"layer{number}.sae.pt")
    said = refused(tmp_path)
    assert said.endswith(", … (23 in all)")
    assert said.count(", ") == registry.SHOWN  # so many are named


def test_a_folder_of_one_folder_names_it_and_twelve_are_named_at_once(tmp_path):
    (tmp_path / "layer_1").mkdir()
    gemma_1(tmp_path / "layer_1/width_16k")
    assert refused(tmp_path).endswith("one of the 1 SAEs in it: layer_1/width_16k")
    names = list("abcdefghijklm")
    assert registry.listing(names[:12]) == "one of the 12 SAEs in it: a, b, c, d, e, f, g, h, i, j, k, l"
    assert registry.listing(names) == "one of the 13 SAEs in it: a, b, c, d, e, f, g, h, i, j, k, l, … (13 in all)"


def test_saes_are_looked_for_five_folders_down_and_in_none_that_is_hidden(tmp_path):
    deep = tmp_path / "a/b/c/d/e"
    for folder in (deep, deep / "f", tmp_path / ".git"):
        folder.mkdir(parents=True, exist_ok=True)
    assert "a folder with one of" in refused(tmp_path)
    (deep / "f/params.npz").write_bytes(b"")
    (tmp_path / ".git/params.npz").write_bytes(b"")
    assert "a folder with one of" in refused(tmp_path)
    (deep / "params.npz").write_bytes(b"")
    assert refused(tmp_path).endswith("one of the 1 SAEs in it: a/b/c/d/e")


@pytest.mark.parametrize(("files", "seen"), [(2, True), (3, False)])
def test_of_very_many_files_the_first_are_looked_at(tmp_path, monkeypatch, files, seen):
    """Whole folders, until so many files and folders have been seen."""
    monkeypatch.setattr(registry, "MOST", 4)
    (tmp_path / "z").mkdir()
    (tmp_path / "z/params.npz").write_bytes(b"")
    for number in range(files):
        (tmp_path / f"{number}.txt").write_text("")
    assert ("one of the 1 SAEs in it: z" in refused(tmp_path)) == seen


@pytest.mark.parametrize("release", ["gemma scope 1", "gemma scope 2", "llama scope", "llama scope r1"])
def test_a_folder_that_is_an_sae_is_told_from_one_that_is_none(tmp_path, release):
    """Also where it has folders of the names that runs have."""
    path, _ = RELEASES[release](tmp_path / "r")
    assert registry.is_sae(epath.Path(path))
    assert not registry.is_sae(epath.Path(tmp_path))
    encoders_of = registry.read(epath.Path(path)).encoder, sharing.opened(str(path)).encoder
    assert [encoder.W_enc.shape for encoder in encoders_of] == [(N, D)] * 2


@pytest.mark.parametrize(("n", "d", "k", "said"), [
    (1, 3, 1, None), (4, 1, 1, None), (4, 3, 4, None), (4, 3, 5, "k = 5: 1 to the 4 features"),
    (4, 3, 0, "k = 0: 1 to the 4 features"), (0, 3, 1, "at least one feature of one dimension"),
    (4, 0, 1, "at least one feature of one dimension"),
])  # fmt: skip
def test_the_least_sae_has_one_feature_of_one_dimension_and_k_of_one(tmp_path, n, d, k, said):
    w = {"encoder.weight": torch.ones(n, d), "encoder.bias": torch.ones(n), "W_dec": torch.ones(n, d)}
    save_file({**w, "b_dec": torch.ones(d)}, tmp_path / "sae.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({"d_in": d, "num_latents": n, "expansion_factor": 0, "k": k}))
    if said is None:
        assert registry.read(epath.Path(tmp_path)).encoder.W_enc.shape == (n, d)
    else:
        assert said in refused(tmp_path)


@pytest.mark.parametrize(("k", "allowed"), [(1, True), (4, True), (6, True), (5, False), (0, False), (-3, False)])
def test_groups_of_sparsify_are_of_equal_size(tmp_path, k, allowed):
    w = weights({"encoder.weight": (N, D), "encoder.bias": (N,), "W_dec": (N, D), "b_dec": (D,)})
    save_file(w, tmp_path / "sae.safetensors")
    config = {"d_in": D, "num_latents": N, "k": k, "activation": "groupmax"}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    if allowed:
        assert registry.read(epath.Path(tmp_path)).encoder.k == k
    else:
        assert f"k = {k}: a divisor of the {N} features" in refused(tmp_path)


def test_what_the_arrays_of_a_file_do_not_say_is_refused_with_the_first_of_their_names(tmp_path):
    torch.save(weights(COLUMNS), tmp_path / "plain.pt")  # of attention, but for the configuration beside
    assert "this one has W_dec, W_enc, b_dec, b_enc" in refused(tmp_path / "plain.pt")
    torch.save({name: torch.zeros(1) for name in "abcdefghij"}, tmp_path / "many.pt")
    assert refused(tmp_path / "many.pt").endswith("this one has a, b, c, d, e, f, g, h")
    torch.save({}, tmp_path / "none.pt")
    assert refused(tmp_path / "none.pt").endswith("this one has nothing")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_of_the_others_come_back_to_the_byte(tmp_path, dtype):
    """Of a folder in either format, in float32 or bfloat16: the same numbers, float32, in the same format."""
    w = {key: value.to(dtype) for key, value in weights({**LINEAR, "b_dec": (D,)}).items()}
    config = {"dict_class": "AutoEncoderTopK", "activation_dim": D, "dict_size": N, "k": K}
    for name in ("dictionary_learning", "sparsify"):
        (tmp_path / name).mkdir()
    (tmp_path / "dictionary_learning/config.json").write_text(json.dumps({"trainer": config}))
    torch.save(w, tmp_path / "dictionary_learning/ae.pt")
    coder = {key: value for key, value in w.items() if key != "decoder.weight"}
    coder["W_dec"] = w["decoder.weight"].T.contiguous()
    save_file(coder, tmp_path / "sparsify/sae.safetensors")
    (tmp_path / "sparsify/cfg.json").write_text(json.dumps({"d_in": D, "num_latents": N, "k": K}))
    for name in ("dictionary_learning", "sparsify"):
        sharing.export(str(tmp_path / name), str(tmp_path / f"{name} again"), name)
    again = torch.load(tmp_path / "dictionary_learning again/ae.pt", weights_only=True)
    for key, value in w.items():
        assert again[key].dtype == torch.float32
        assert again[key].numpy().tobytes() == value.float().numpy().tobytes()
    files = [tmp_path / name / "sae.safetensors" for name in ("sparsify", "sparsify again")]
    if dtype == torch.float32:
        assert files[0].read_bytes() == files[1].read_bytes()
    for key, value in load_file(files[1]).items():
        assert value.dtype == torch.float32
        assert torch.equal(value, coder[key].float())


def test_bfloat16_comes_as_float32(x, tmp_path):
    folder, _ = gemma_2(tmp_path / "g", torch.bfloat16)
    encoder = registry.read(epath.Path(folder)).encoder
    assert {np.asarray(leaf).dtype for leaf in jax.tree.leaves(encoder)} == {np.dtype(np.float32)}


def test_an_unknown_release_is_refused_before_anything_is_loaded(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.zeros((300, 4), np.float32))
    for name, said in {
        "saelens:gemma-scope-2b-pt-res/nothing": "one of the 316 SAEs of gemma-scope-2b-pt-res",
        "saelens:nothing": "saelens:RELEASE/ID, a release of SAELens' list",
        "saelens:Gemma-Scope-9b": "a release of SAELens' list as gemma-scope-9b-",
    }.items():
        argv = ["diagnose", f"--sae={name}", f"--activations={tmp_path}/x.npy", f"--workdir={tmp_path}/w"]
        assert cli.main(argv) == 2
        assert said in capsys.readouterr().err
    assert not Path(tmp_path, "w").exists()


def test_of_many_names_the_first_are_listed():
    assert arrays.listed(list("abcdefgh")) == "a, b, c, d, e, f, g, h"
    assert arrays.listed(list("abcdefghi")) == "a, b, c, d, e, f, g, h, … (9 in all)"
