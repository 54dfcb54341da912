"""Anybody's SAE: what each library's own `encode` fires, counted by the autopsy; FVE and the centred twin in NumPy."""

import itertools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from etils import epath

import sae_jax
from sae_jax.autoencoder.dense import DenseSAE
from sae_jax.diagnosis import autopsy
from sae_jax.errors import Refused
from sae_jax.exchange import encoders, registry, sharing, sightings
from sae_jax.exchange.encoders import Encoder, Opened
from sae_jax.reports import tables

D, N, K, TOKENS = 12, 48, 5, 1200


@pytest.fixture(scope="module")
def x():
    """Activations whose mean is three times as long as they vary."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(TOKENS, D)) * np.geomspace(1, 0.3, D)
    mean = rng.normal(size=D)
    return np.float32(x + 3 * np.linalg.norm(x.std(axis=0)) * mean / np.linalg.norm(mean))


@pytest.fixture(scope="module")
def sae_lens():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sae_lens
    return sae_lens


def weights(shapes, seed=1):
    """Random, with features of every fate: some far below zero, some barely above, the others around."""
    rng = np.random.default_rng(seed)
    found = {key: rng.normal(size=shape) / np.sqrt(D if "W" in key or "weight" in key else 1)
             for key, shape in shapes.items()}  # fmt: skip
    for key in found:
        if key in ("b_enc", "b_gate", "encoder.bias", "gate_bias"):
            found[key][: N // 4] -= 12
            found[key][-4:] += 9
        if key == "threshold":
            found[key] = np.abs(found[key]) * 2
            if found[key].ndim:
                found[key][: N // 8 * 3] += 4
        if "r_mag" in key:
            found[key] *= 0.3
    return {key: torch.tensor(np.asarray(value, np.float32)) for key, value in found.items()}


def expected(acts, x, W_dec, b_dec, transcodes=False):
    """(fired counts, FVE) from a library's activations, in float64."""
    acts, x = acts.astype(np.float64), x.astype(np.float64)
    error = np.sum((x - acts @ np.float64(W_dec) - b_dec) ** 2) if not transcodes else np.nan
    return (acts != 0).sum(axis=0), 1 - error / np.sum((x - x.mean(axis=0)) ** 2)


def check(folder, x, acts, z_pre, moved, W_dec, b_dec, b_in, transcodes=False):
    """The autopsy of a folder against counts from activations `acts`, and of the SAE with its bias moved `moved`.

    `x` is what the decoder is compared with: the normed tokens; the autopsy gets `folder` and the tokens as they are.
    """
    path, tokens = folder
    found = autopsy.dissect(str(path), tokens, n_probes=16)
    n_fired, fve = expected(acts, x, W_dec, b_dec, transcodes)
    np.testing.assert_array_equal(found.features["n_fired"], n_fired)
    if "gated" not in found["architecture"]:  # whose gate may open where its magnitude is 0
        margin = found.features["distance_to_threshold"]
        assert (margin[n_fired > 0] >= -1e-4).all()
        assert (margin[n_fired == 0] <= 1e-4).all()
        assert (margin[n_fired == 0] < 0).any() or (n_fired > 0).all()
    assert found["fired_once"] == (n_fired == 1).mean()
    assert f"wake at most the {(n_fired == 1).sum()} that fired once" in tables.autopsy_table(found)
    positive = (z_pre > 0).any(axis=0)
    assert found["dead_features"]["dead_by_relu"] == np.flatnonzero(~positive).tolist()
    assert found["dead_features"]["dead_by_topk"] == np.flatnonzero(positive & (n_fired == 0)).tolist()
    assert 0 < len(found["dead_features"]["dead_by_relu"]) < N or "Abs" in found["architecture"]
    then, then_fve = expected(moved, x, W_dec, x.mean(axis=0, dtype=np.float64), transcodes)
    assert found["if_centred"]["dead_total"] == (then == 0).mean()
    assert found["if_centred"]["l0"] == pytest.approx(then.sum() / len(x))
    assert found["if_centred"]["revived"] == ((n_fired == 0) & (then > 0)).sum()
    mean, sigma = x.mean(axis=0, dtype=np.float64), np.linalg.norm(x.std(axis=0, dtype=np.float64))
    assert found["gamma_left"] == pytest.approx(np.linalg.norm(mean - b_in) / sigma, rel=1e-4)
    if transcodes:
        assert found["fve"] is None
        assert found["if_centred"]["fve"] is None
        assert "FVE is not known" in found["advice"]
    else:
        assert found["fve"] == pytest.approx(fve, abs=1e-4 * max(1, abs(fve)))
        assert found["if_centred"]["fve"] == pytest.approx(then_fve, abs=1e-4 * max(1, abs(then_fve)))
        assert f"{then_fve:.3f}" in found["advice"]  # beside what was revived
    if x is tokens:  # no norm of each token
        agree(path, tokens, acts, acts.astype(np.float64) @ W_dec + b_dec, skips="skip" in found["architecture"])
    return found


def dense(codes, n):
    """As a matrix; a row's order is checked on the way."""
    out = np.zeros((len(codes.values), n), np.float32)
    np.add.at(out, (np.arange(len(out))[:, None], codes.indices), codes.values)
    assert (np.diff(np.abs(codes.values), axis=1) <= 0).all()
    return out


def agree(sae, tokens, acts, x_hat, skips=False):
    """`features` and `reconstruct` against a library's activations and x̂, both in the units of the tokens."""
    codes = sae_jax.features(sae, tokens)
    assert codes.values.dtype == np.float32
    assert codes.indices.dtype == np.int32
    assert codes.values.shape[1] in {(acts != 0).sum(axis=1).max(), opened_k(sae)}
    np.testing.assert_allclose(dense(codes, acts.shape[1]), acts, atol=2e-5 * np.abs(acts).max())
    if not skips:
        found = sae_jax.reconstruct(sae, tokens)
        np.testing.assert_allclose(found, x_hat, atol=5e-5 * np.abs(x_hat).max())


def opened_k(sae):
    encoder = sharing.opened(sae).encoder
    return encoder.k if encoder.rule in encoders.COUNTED else None


# -- SAELens ---------------------------------------------------------------------------------------------------------

NORMS = ("none", "layer_norm", "constant_norm_rescale", "expected_average_only_in")
SAELENS = [
    *(("standard", {"apply_b_dec_to_input": applied, "normalize_activations": norm})
      for applied, norm in itertools.product((True, False), NORMS)),
    *(("topk", {"k": K, "apply_b_dec_to_input": applied, "rescale_acts_by_decoder_norm": rescaled,
                "normalize_activations": norm})
      for applied, rescaled, norm in itertools.product((True, False), (True, False), NORMS[:3])),
    *(("abstopk", {"k": K, "apply_b_dec_to_input": applied, "rescale_acts_by_decoder_norm": rescaled})
      for applied, rescaled in itertools.product((True, False), (True, False))),
    *((architecture, {"apply_b_dec_to_input": applied, "normalize_activations": norm})
      for architecture, applied, norm in itertools.product(("jumprelu", "gated"), (True, False), NORMS[:2])),
    *((architecture, {"d_out": D + 3, "apply_b_dec_to_input": False})
      for architecture in ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")),
]  # fmt: skip


def saelens_of(sae_lens, architecture, options):
    """SAELens' own SAE with weights of ours."""
    from sae_lens.registry import get_sae_class

    cls, config = get_sae_class(architecture)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae = cls(config(d_in=D, d_sae=N, **options))
    state = sae.state_dict()
    sae.load_state_dict(weights({key: tuple(value.shape) for key, value in state.items()}))
    return sae


def with_its_bias_at(sae, mean):
    """Acts of the same SAE whose encoder subtracts the mean of what it sees."""
    process = sae.process_sae_in

    def moved(t):
        bias = sae.b_dec if sae.cfg.apply_b_dec_to_input else 0
        return process(t) + bias - torch.from_numpy(mean).to(t.dtype)

    return moved


@pytest.mark.parametrize(
    ("architecture", "options"), SAELENS, ids=[f"{a}-{'-'.join(map(str, o.values()))}" for a, o in SAELENS]
)
def test_saelens_of_every_architecture_and_option(sae_lens, x, tmp_path, architecture, options):
    sae = saelens_of(sae_lens, architecture, options)
    sae.save_model(tmp_path / "sae")
    t = torch.from_numpy(x)
    with torch.no_grad():
        acts = sae.encode(t).numpy()  # in float32, its own arithmetic
        sees = sae.process_sae_in(t) + (sae.b_dec if options["apply_b_dec_to_input"] else 0)
        b_enc = sae.b_gate if architecture == "gated" else sae.b_enc
        z_pre = (sae.process_sae_in(t) @ sae.W_enc + b_enc).numpy()
        if architecture == "abstopk":
            z_pre = np.abs(z_pre)
        mean = sees.double().mean(dim=0).numpy()
        sae.process_sae_in = with_its_bias_at(sae, mean)
        moved = sae.encode(t).numpy()
    W_dec = sae.W_dec.detach().numpy()
    if options.get("rescale_acts_by_decoder_norm"):
        W_dec = W_dec / np.linalg.norm(W_dec, axis=1, keepdims=True)
    b_dec = sae.b_dec.detach().numpy()
    b_in = b_dec if options["apply_b_dec_to_input"] else 0
    found = check((tmp_path / "sae", x), sees.numpy(), acts, z_pre, moved, W_dec, b_dec, b_in,
                  transcodes="transcoder" in architecture)  # fmt: skip
    assert found["subtracts_b_dec"] == options["apply_b_dec_to_input"]
    assert ("not apply" in found["advice"]) == (options.get("normalize_activations") == "expected_average_only_in")


def test_encode_is_the_librarys_value_by_value(sae_lens, x, tmp_path):
    for number, (architecture, options) in enumerate(SAELENS):
        sae = saelens_of(sae_lens, architecture, options)
        sae.save_model(tmp_path / str(number))
        encoder = registry.read(epath.Path(tmp_path / str(number))).encoder
        with torch.no_grad():
            theirs = sae.encode(torch.from_numpy(x)).numpy()
        ours = np.asarray(encoders.encode(jax.tree.map(jnp.asarray, encoder), jnp.asarray(x)))
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max(), err_msg=f"{architecture} {options}")


def test_features_and_reconstructions_are_the_librarys(sae_lens, x, tmp_path):
    """x̂ is that of its forward pass: norms undone, b_dec added, skip connections counted."""
    for number, (architecture, options) in enumerate(SAELENS):
        sae = saelens_of(sae_lens, architecture, options)
        if "skip" in architecture:
            sae.load_state_dict({**sae.state_dict(), "W_skip": torch.randn(sae.W_skip.shape)})
        sae.save_model(tmp_path / str(number))
        t = torch.from_numpy(x)
        with torch.no_grad():
            acts, x_hat = sae.encode(t).numpy(), sae(t).numpy()
        norm = options.get("normalize_activations")
        size = {"layer_norm": x.std(axis=1, ddof=1, keepdims=True),
                "constant_norm_rescale": np.linalg.norm(x, axis=1, keepdims=True) / D**0.5}.get(norm, 1)  # fmt: skip
        agree(tmp_path / str(number), x, acts * size, x_hat)
        loaded = sae_jax.load(tmp_path / str(number))
        if architecture != "topk":
            assert isinstance(loaded, Opened)
            agree(loaded, x, acts * size, x_hat)
            if architecture in ("jumprelu", "standard") and not loaded.stays:
                sae_jax.export(loaded, str(tmp_path / f"out{number}"))
                agree(tmp_path / f"out{number}", x, acts * size, x_hat)
                continue
            with pytest.raises(Refused, match=r"a TopK, JumpReLU or ReLU SAE"):
                sae_jax.export(loaded, str(tmp_path / "out"))


@pytest.mark.parametrize("size", [(24, 96), (256, 4096)], ids=["small", "large"])  # n·d below and above 2^20
@pytest.mark.parametrize("rule", ["topk", "abstopk", "groupmax", "threshold", "relu", "gated"])
def test_features_of_every_rule_are_those_of_numpy(monkeypatch, rule, size):
    """In float64, as the table in `encoders` writes them; 300 tokens in parts whose widths differ."""
    monkeypatch.setattr("sae_jax.exchange.features.ROWS", 128)
    (d, n), k, rng = size, 8, np.random.default_rng(3)
    x = np.float32((rng.normal(size=(300, d)) + 2) * np.linspace(0.1, 2, 300)[:, None])
    rows = np.float32(rng.normal(size=(n, d)) / np.sqrt(d))
    b_enc, b_dec, r_mag, b_mag = (np.float32(rng.normal(size=m) * 0.3) for m in (n, d, n, n))
    threshold = np.float32(rng.uniform(0, 3, size=n))
    more = {"threshold": {"threshold": threshold}, "gated": {"r_mag": r_mag, "b_mag": b_mag}, "relu": {}}.get(
        rule, {"k": k})
    encoder = Encoder(W_enc=rows, b_enc=b_enc, W_dec=rows, b_dec=b_dec, b_in=b_dec, rule=rule, **more)
    u = (x.astype(np.float64) - b_dec) @ rows.T
    z = u + b_enc
    bar = np.sort(np.abs(z) if rule == "abstopk" else z, axis=1)[:, -k, None]
    largest = z.reshape(300, k, -1).max(axis=2).repeat(n // k, axis=1)
    acts = {
        "topk": np.where(z >= bar, np.maximum(z, 0), 0), "abstopk": np.where(np.abs(z) >= bar, z, 0),
        "groupmax": np.where(z >= largest, np.maximum(z, 0), 0), "threshold": np.where(z > threshold, z, 0),
        "relu": np.maximum(z, 0), "gated": np.where(z > 0, np.maximum(np.exp(r_mag) * u + b_mag, 0), 0),
    }[rule]  # fmt: skip
    agree(Opened(encoder, {}, "none"), x, acts, acts @ rows + b_dec)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_saelens_wrote_come_back_to_the_byte(sae_lens, tmp_path, dtype):
    sae = saelens_of(sae_lens, "topk", {"k": K, "dtype": dtype})
    sae.save_model(tmp_path / "theirs")
    sharing.export(str(tmp_path / "theirs"), str(tmp_path / "ours"), "saelens")
    theirs, ours = ((tmp_path / name / "sae_weights.safetensors").read_bytes() for name in ("theirs", "ours"))
    if dtype == "float32":
        assert theirs == ours
    config = json.loads((tmp_path / "ours/cfg.json").read_text())
    assert config["dtype"] == "float32"
    again = sae_lens.SAE.load_from_disk(tmp_path / "ours")
    for key, value in sae.state_dict().items():
        assert value.dtype == getattr(torch, dtype)
        assert again.state_dict()[key].dtype == torch.float32
        assert again.state_dict()[key].numpy().tobytes() == value.float().numpy().tobytes()


@pytest.mark.parametrize("version", [None, "5.11.0", "4.0.0"])
def test_saelens_before_version_6(sae_lens, x, tmp_path, version):
    """Flat configurations: no architecture at all, `standard` that is TopK with its k elsewhere."""
    cases = {
        "relu": ({}, "relu", None),
        "standard": ({"architecture": "standard", "activation_fn_str": "relu"}, "relu", None),
        "topk": ({"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}, "topk",
                 K),
        "normed": ({"normalize_activations": "layer_norm"}, "relu", None),
        "new key": ({"activation_fn": "topk", "activation_fn_kwargs": {"k": K}}, "topk", K),
    }
    for name, (config, rule, k) in cases.items():
        sae = saelens_of(sae_lens, "topk" if k else "standard", {"k": k} if k else {})
        sae.save_model(tmp_path / name)
        config = {"d_in": D, "d_sae": N, "dtype": "torch.float32", "hook_point": "blocks.1.hook_resid_pre",
                  "normalize_activations": None, "model_name": "gpt2-small", **config}  # fmt: skip
        if version:
            config["sae_lens_version"] = version
        (tmp_path / name / "cfg.json").write_text(json.dumps(config))
        opened = registry.read(epath.Path(tmp_path / name))
        assert (opened.encoder.rule, opened.encoder.k) == (rule, k)
        assert opened.encoder.norm == ("sample_layer_norm" if name == "normed" else "none")
        assert opened.metadata["hook_name"] == "blocks.1.hook_resid_pre"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = sae_lens.SAE.load_from_disk(tmp_path / name).encode(torch.from_numpy(x)).detach().numpy()
        ours = np.asarray(encoders.encode(jax.tree.map(jnp.asarray, opened.encoder), jnp.asarray(x)))
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


# -- large ones, which go through other kernels on a CPU -------------------------------------------------------------


@pytest.mark.parametrize("above", [None, 3.0, 0.0])
def test_large_saes_are_counted_as_small_ones(above):
    """In pieces side by side; of thresholds at 3 the few rows that fire are read, at 0 (half of them fire) all."""
    rng = np.random.default_rng(5)
    n, d, k = 4096, 256, 16
    x = np.float32(rng.normal(size=(700, d)) + 0.5)
    rows = np.float32(rng.normal(size=(n, d)) / np.sqrt(d))
    b_dec, b_enc = np.float32(0.5 * x.mean(axis=0)), np.zeros(n, np.float32)
    kind = {"rule": "topk", "k": k} if above is None else {"rule": "threshold", "threshold": b_enc + np.float32(above)}
    encoder = Encoder(W_enc=rows, b_enc=b_enc, W_dec=rows, b_dec=b_dec, b_in=b_dec, **kind)
    found = autopsy.dissect(Opened(encoder, {}, "none"), x, n_probes=16)
    for bias, at in ((b_dec, found), (x.mean(axis=0, dtype=np.float64), found["if_centred"])):
        z = (x.astype(np.float64) - bias) @ rows.T
        bar = np.partition(z, -k, axis=1)[:, -k, None] if above is None else above
        fires = (z >= bar) & (z > 0)
        ties = np.zeros(n) if above is None else (np.abs(z - bar) < 1e-5).sum(axis=0)
        assert (fires.sum(axis=1).max() > n // 64) == (above == 0)
        error = np.sum((x - np.where(fires, z, 0) @ rows - bias) ** 2)
        fve = 1 - error / np.sum((x - x.mean(axis=0, dtype=np.float64)) ** 2)
        assert at["fve"] == pytest.approx(fve, abs=1e-4 * max(1, abs(fve)))
        assert at["l0"] * len(x) == pytest.approx(fires.sum(), abs=float(ties.sum()))
        if at is found:
            assert (np.abs(found.features["n_fired"] - fires.sum(axis=0)) <= ties).all()


def test_small_activations_count_as_many(rng):
    """Where tokens have more entries than the sparse product takes, all are added, however small they are."""
    rows = np.float32(rng.normal(size=(256, D)))
    dense = np.zeros((3, 256), np.float32)
    dense[1, :9] = 0.25  # the sparse product takes 256 / 64 = 4
    found = encoders._sparse_product(jnp.asarray(dense), jnp.asarray(rows))
    np.testing.assert_allclose(found, dense @ rows, rtol=1e-5)


def test_an_sae_is_called_by_what_it_does(rng):
    rows = rng.normal(size=(N, D))
    plain = Encoder(W_enc=rows, b_enc=np.zeros(N), W_dec=rows, b_dec=np.zeros(D), b_in=np.zeros(D), k=K)
    assert plain.name == encoders.NAMES["topk"]
    assert plain.replace(transcodes=True).name == f"{plain.name} transcoder"
    assert plain.replace(transcodes=True, W_skip=np.eye(D)).name == f"{plain.name} skip transcoder"


@pytest.mark.parametrize(("reshape", "said"), [
    ("none", ""), ("hook_z", "reshape_activations = 'hook_z' is not written")
])  # fmt: skip
def test_what_an_export_would_lose_is_known_when_it_is_read(sae_lens, tmp_path, reshape, said):
    sae = saelens_of(sae_lens, "standard", {"apply_b_dec_to_input": True})
    sae.save_model(tmp_path / "sae")
    path = tmp_path / "sae" / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"reshape_activations": reshape}))
    assert registry.read(epath.Path(tmp_path / "sae")).stays == said


# -- norms, bars and what is seen, in NumPy --------------------------------------------------------------------------


@pytest.mark.parametrize("norm", encoders.NORMS)
def test_norms_of_small_tokens_and_of_none_are_those_of_numpy(rng, norm):
    """Where what is added to a deviation counts, to tokens of length 0, and back: x ≈ offset + size · norm(x)."""
    x = rng.normal(size=(12, D)) * np.geomspace(1e-3, 10, 12)[:, None]
    x[5] = 0
    mean, deviation = x.mean(axis=1, keepdims=True), x.std(axis=1, ddof=1, keepdims=True)
    length, zero, root = np.linalg.norm(x, axis=1, keepdims=True), np.zeros((12, 1)), D**0.5
    ours = np.sqrt(x.var(axis=1, keepdims=True) + 1e-5)
    by = np.where(length > 0, length, 1)
    normed, offset, size = {
        "none": (x, zero, zero + 1),
        "layer_norm": ((x - mean) / ours, mean, ours),
        "layer_norm_unit": ((x - mean) / ours / root, mean, ours * root),
        "unit": (x / by, zero, length),
        "sample_layer_norm": ((x - mean) / (deviation + 1e-5), mean, deviation),
        "constant_norm_rescale": (x / by * root, zero, length / root),
    }[norm]
    np.testing.assert_allclose(encoders.NORMS[norm](jnp.float32(x)), normed, rtol=1e-4, atol=1e-6)
    found = encoders.undone(jnp.float32(x), norm)
    np.testing.assert_allclose(found[0], offset, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found[1], size, rtol=1e-4, atol=1e-9)


BARS = {
    "relu": ({}, [0, 1, 2, 0], [False, True, True, False]),
    "gated": ({"r_mag": np.zeros(4), "b_mag": np.ones(4)}, [0, 2, 3, 0], [False, True, True, False]),
    "threshold": ({"threshold": np.float32([-1, 1, 1, -9])}, [0, 0, 2, 0], [False, True, True, False]),
    "topk": ({"k": 4}, [0, 1, 2, 0], [False, True, True, False]),
    "groupmax": ({"k": 4}, [0, 1, 2, 0], [False, True, True, False]),
    "abstopk": ({"k": 4}, [0, 1, 2, -3], [False, True, True, True]),
}  # fmt: skip


@pytest.mark.parametrize("rule", BARS)
def test_what_stands_exactly_on_a_bar_does_not_pass_it(rule):
    more, acts, positive = BARS[rule]
    eye, zero = jnp.eye(4), jnp.zeros(4)
    encoder = Encoder(W_enc=eye, b_enc=zero, W_dec=eye, b_dec=zero, b_in=zero, rule=rule, **more)
    x = jnp.array([[0.0, 1.0, 2.0, -3.0]])
    np.testing.assert_array_equal(encoders.encode(encoder, x), [acts])
    np.testing.assert_array_equal(encoders.select(encoder, x, encoders.magnitude_bias(encoder))[0], [positive])


def test_rows_are_gone_through_some_at_a_time_in_float64(rng):
    W, seen = np.float32(rng.normal(size=(11, 3))), []

    def squared(rows):
        seen.append((len(rows), rows.dtype))
        return (rows**2).sum(axis=1)

    np.testing.assert_allclose(encoders.in_rows(W, squared, rows=4), (W.astype(np.float64) ** 2).sum(axis=1))
    assert seen == [(4, np.float64), (4, np.float64), (3, np.float64)]


@pytest.mark.parametrize(("threshold", "bars"), [
    (np.float32(-1), [0, 0, 0]), (np.float32(0.25), [0.25, 0.25, 0.25]), (np.float32([-0.5, 0.25, 2]), [0, 0.25, 2]),
])  # fmt: skip
def test_of_our_own_saes_no_bar_is_below_zero(threshold, bars):
    kind = "jumprelu" if threshold.ndim else "batch_topk"
    sae = DenseSAE(W_enc=np.eye(3), b_enc=np.zeros(3), W_dec=np.eye(3), b_dec=np.ones(3), k=1, threshold=threshold,
                   activation=kind)  # fmt: skip
    found = encoders.of_sae(sae)
    assert found.rule == "threshold"
    np.testing.assert_array_equal(found.threshold, np.float32(bars))
    assert encoders.of_sae(sae.replace(threshold=None)).rule == "relu"


SEEN = {
    "topk": {"k": 4}, "abstopk": {"k": 4}, "groupmax": {"k": 4}, "threshold": {}, "gated": {},
    "topk rescaled": {"k": 4}, "threshold rescaled": {}, "transcoder": {}, "transcoder without its target": {},
}  # fmt: skip


def seen_by_numpy(encoder, place, point, x, valid, ordinary, target):
    """(Seen, scores) by the table in `encoders`, a margin being what is ranked less the bar, in float64."""
    u = (x - point) @ encoder.W_enc.T + place.offset
    z = u + encoder.b_enc
    by = np.ones(len(encoder.b_enc)) if encoder.ranked_by is None else encoder.ranked_by
    ranked = z * by
    if encoder.rule == "topk":
        bar = np.maximum(np.sort(ranked, axis=1)[:, -encoder.k, None], 0)
    elif encoder.rule == "abstopk":
        bar = np.sort(np.abs(ranked), axis=1)[:, -encoder.k, None]
    elif encoder.rule == "groupmax":
        bar = np.maximum(ranked.reshape(len(x), encoder.k, -1).max(axis=2), 0).repeat(z.shape[1] // encoder.k, axis=1)
    else:
        bar = np.maximum(encoder.threshold, 0) if encoder.rule == "threshold" else np.zeros(1)
    acts, positive = np.where((ranked >= bar) & (ranked > 0), ranked, 0), z > 0
    if encoder.rule == "abstopk":
        acts, positive, ranked = np.where(np.abs(ranked) >= bar, ranked, 0), z != 0, np.abs(ranked)
    if encoder.rule == "gated":
        acts = np.where(positive, np.maximum(np.exp(encoder.r_mag) * u + encoder.b_mag, 0), 0)
    margin = np.where(valid[:, None], ranked - bar, -np.inf)
    x_hat = acts / np.where(by > 0, by, 1) @ encoder.W_dec + place.b_dec
    x_hat += 0 if encoder.W_skip is None else x @ encoder.W_skip.T
    error = np.zeros(len(x)) if target is None else ((target - x_hat) ** 2).sum(axis=1)
    acts = np.abs(acts[valid])
    seen = ((positive[valid]).any(axis=0), (acts > 0).sum(axis=0), acts.max(axis=0), margin.max(axis=0),
            error[valid].sum(), error[valid & ordinary].sum())  # fmt: skip
    return seen, np.where(margin >= 0, ranked, margin)


@pytest.mark.parametrize("kind", SEEN)
def test_what_tokens_show_is_what_numpy_counts(monkeypatch, rng, kind):
    """At two places of a bias at once, in three pieces of 512 rows, the last one padded; one token of ten is none."""
    n, d, n_tokens, rule = 24, 6, 1100, kind.split()[0]
    monkeypatch.setattr(sightings, "PIECE", 600 * n)  # a power of two of rows is taken
    monkeypatch.setattr(sightings, "ABREAST", 1)
    W, W_dec = np.float32(rng.normal(size=(2, n, d)))
    b_enc, r_mag, b_mag, threshold = np.float32(rng.normal(size=(4, n)) * [[0.5], [0.3], [0.5], [1]])
    b_dec, W_skip = np.float32(rng.normal(size=d)), np.float32(rng.normal(size=(d, d)))
    W[3], b_enc[3] = 0, 0  # never other than 0
    b_enc[:3] -= 9  # never positive
    more = dict(SEEN[kind])
    if rule == "threshold":
        more["threshold"] = threshold
    elif rule == "gated":
        more |= {"r_mag": r_mag, "b_mag": b_mag}
    if "rescaled" in kind:
        W_dec[5] = 0
        W_dec[6:9] /= 10
        more["ranked_by"] = np.linalg.norm(W_dec, axis=1)
    transcodes = rule == "transcoder"
    if transcodes:
        rule, more["W_skip"] = "relu", W_skip
    encoder = Encoder(W_enc=W, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec, b_in=b_dec * (not transcodes), rule=rule,
                      transcodes=transcodes, **more)  # fmt: skip
    x = np.float32(rng.normal(size=(n_tokens, d)) * 1.8)
    x[7] = [3, 4, 0, 0, 0, 0]  # of norm 5: as long as an ordinary token may be
    valid, point = rng.uniform(size=n_tokens) > 0.1, np.float32(rng.normal(size=d))
    valid[7] = True
    ordinary, target, goal = np.linalg.norm(x, axis=1) <= 5, x, None
    assert 0.3 < ordinary.mean() < 0.9
    if transcodes:
        target = None
    if kind == "transcoder":
        target, ordinary = np.float32(rng.normal(size=(n_tokens, d))), rng.uniform(size=n_tokens) > 0.5
        goal = sightings.Goal(target, ordinary)
    places = [sightings.place(encoder, point, moved) for moved in (False, True)]
    np.testing.assert_allclose(places[0].offset, W @ (np.float64(point) - encoder.b_in), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(places[0].b_dec, b_dec)
    np.testing.assert_array_equal(places[1].offset, np.zeros(n))
    np.testing.assert_array_equal(places[1].b_dec, b_dec if transcodes else point)

    def see(valid):
        return sightings.see(encoder, tuple(places), point, x, valid, jnp.float32(5), goal, best=True)

    early = np.arange(n_tokens) < 700
    found, best = see(valid)
    first, later = (jax.tree.map(np.asarray, see(valid & some)[0]) for some in (early, ~early))
    for there, tops, seen, a, b in zip(places, best, found, first, later, strict=True):
        expected, scores = seen_by_numpy(encoder, there, point, x.astype(np.float64), valid, ordinary, target)
        for whole in (seen, a | b):
            np.testing.assert_array_equal(whole.positive, expected[0])
            np.testing.assert_array_equal(whole.n_fired, expected[1])
            for ours, theirs in zip(whole[2:], expected[2:], strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-4)
        padded = np.full((3 * 512, n), -np.inf)
        padded[:n_tokens] = scores
        stretches = padded.reshape(-1, 256, n)
        np.testing.assert_allclose(tops.score, stretches.max(axis=1), rtol=1e-4, atol=1e-4)
        wanted = stretches.argmax(axis=1) + 256 * np.arange(len(stretches))[:, None]
        at = (slice(None), np.flatnonzero(W.any(axis=1)))  # of what is always 0 every token is the best
        np.testing.assert_array_equal(np.asarray(tops.row)[at], wanted[at])
