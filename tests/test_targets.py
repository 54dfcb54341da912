"""A transcoder beside the activations that it is to reconstruct: FVE counted in NumPy, through the command."""

import json
import warnings

import numpy as np
import pytest
import torch
from test_encoders import D, N, sae_lens, saelens_of  # noqa: F401

from sae_jax import cli
from sae_jax.diagnosis import autopsy
from sae_jax.errors import Refused
from sae_jax.exchange.encoders import Encoder, Opened

TOKENS, GIANTS = 4500, 40  # more than a batch


def activations(rng):
    """What a transcoder reads."""
    return np.float32(rng.normal(size=(TOKENS, D)) + 2 * rng.normal(size=D))


def targets(rng, x_hat):
    """The target of an x̂ that explains much of it; some of its tokens are giants, and the mean is long."""
    noise = 0.5 * x_hat.std(axis=0) * rng.normal(size=x_hat.shape)
    target = x_hat + noise + 3 * rng.normal(size=x_hat.shape[1])
    target[:: TOKENS // GIANTS] *= 60
    return np.float32(target)


def explained(target, x_hat):
    """FVE of all tokens, and of those that are no giants."""
    target, x_hat = np.float64(target), np.float64(x_hat)
    norms = np.linalg.norm(target, axis=1)
    ordinary = norms <= 10 * np.median(norms)
    assert GIANTS <= (~ordinary).sum() < 2 * GIANTS
    return [1 - np.sum((target - x_hat)[of] ** 2) / np.sum((target[of] - target[of].mean(axis=0)) ** 2)
            for of in (norms > 0, ordinary)]  # fmt: skip


@pytest.mark.parametrize("kind", ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"])
def test_fve_is_that_of_the_target(sae_lens, rng, tmp_path, capsys, kind):  # noqa: F811
    sae = saelens_of(sae_lens, kind, {"d_out": D + 3, "apply_b_dec_to_input": False})
    if "skip" in kind:
        sae.load_state_dict({**sae.state_dict(), "W_skip": torch.randn(sae.W_skip.shape)})
    sae.save_model(tmp_path / "sae")
    x = activations(rng)
    mean = x.mean(axis=0, dtype=np.float64)

    def x_hat(moved):
        """Its forward pass, with the mean subtracted from what the encoder reads; the skip connection sees all."""
        with torch.no_grad():
            acts = sae.encode(torch.from_numpy(np.float32(x - mean * moved)))
            skipped = x @ sae.W_skip.numpy().T if "skip" in kind else 0
            return sae.decode(acts).numpy() + skipped

    with torch.no_grad():
        np.testing.assert_allclose(x_hat(False), sae(torch.from_numpy(x)).numpy(), atol=1e-4)
    y = targets(rng, x_hat(False))
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    flags = [f"--{key}={tmp_path / name}" for key, name in
             {"sae": "sae", "activations": "x.npy", "target": "y.npy", "workdir": "out"}.items()]  # fmt: skip
    assert cli.main(["diagnose", *flags, "--n_probes=16"]) == 0
    found = json.loads((tmp_path / "out/report.json").read_text())
    for at, moved in ((found, False), (found["if_centred"], True)):
        fve, without = explained(y, x_hat(moved))
        assert at["fve"] == pytest.approx(fve, abs=1e-4 * max(1, abs(fve)))
        assert at["fve_without_giants"] == pytest.approx(without, abs=1e-4 * max(1, abs(without)))
    assert found["target"]["d_out"] == D + 3
    said = capsys.readouterr().out
    assert f"FVE is of the target, {D + 3} dimensions of as many tokens, {found['target']['n_giant_tokens']} of" in said
    assert f"{found['fve_without_giants']:.3f}" in said
    assert f"from {found['fve']:.3f} to {found['if_centred']['fve']:.3f}" in said
    page = (tmp_path / "out/report.html").read_text()
    assert "of the target" in page
    assert f"{found['fve']:.3f}".replace("-", "−") in page


@pytest.mark.parametrize(("of_x", "of_y"), [(2.0**-60, 2.0**50), (2.0**70, 2.0**-30)])
def test_units_of_either_side_change_nothing(rng, of_x, of_y):
    x, k = activations(rng), {"rule": "topk", "k": 5}
    W_enc, W_dec, skip = (np.float32(rng.normal(size=s) / 3) for s in ((N, D), (N, D - 2), (D - 2, D)))
    b_enc, b_dec, zero = np.float32(rng.normal(size=N)), np.float32(rng.normal(size=D - 2)), np.zeros(D, np.float32)

    def found(s, t, y):
        encoder = Encoder(W_enc=W_enc, b_enc=b_enc * np.float32(s), W_dec=W_dec * np.float32(t / s),
                          b_dec=b_dec * np.float32(t), b_in=zero, W_skip=skip * np.float32(t / s), transcodes=True,
                          **k)  # fmt: skip
        return autopsy.dissect(Opened(encoder, {}, "none"), x * np.float32(s), target=y * np.float32(t), n_probes=16)

    z = x.astype(np.float64) @ W_enc.T + b_enc
    acts = np.where(z >= np.sort(z, axis=1)[:, -5, None], np.maximum(z, 0), 0)
    x_hat = acts @ W_dec + b_dec + x @ skip.T
    y = targets(rng, x_hat)
    plain, scaled = found(1, 1, y), found(of_x, of_y, y)
    for key, value in zip(("fve", "fve_without_giants"), explained(y, x_hat), strict=True):
        assert plain[key] == pytest.approx(value, abs=1e-4)
        assert scaled[key] == pytest.approx(plain[key], abs=1e-5)


def test_what_is_no_target_is_refused(sae_lens, rng, tmp_path, capsys):  # noqa: F811
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saelens_of(sae_lens, "transcoder", {"d_out": D + 3, "apply_b_dec_to_input": False}).save_model(tmp_path / "t")
        saelens_of(sae_lens, "standard", {}).save_model(tmp_path / "s")
    x = activations(rng)
    y = np.float32(rng.normal(size=(TOKENS, D + 3)))
    bad = y.copy()
    bad[7, 2] = np.nan
    for name, array in {"x": x, "y": y, "few": y[:-1], "narrow": y[:, :-1], "bad": bad}.items():
        np.save(tmp_path / f"{name}.npy", array)
    for sae, target, said in (
        ("t", "few.npy", f"the {TOKENS} tokens of the activations, not {TOKENS - 1}"),
        ("t", "narrow.npy", f"d_out {D + 3}, not {D + 2}"),
        ("t", "bad.npy", "row 7, dimension 2 is nan"),
        ("t", "none.npy", "nothing is there"),
        ("s", "y.npy", "no transcoder"),
    ):
        flags = [f"--{key}={tmp_path / name}" for key, name in
                 {"sae": sae, "activations": "x.npy", "target": target, "workdir": "out"}.items()]  # fmt: skip
        assert cli.main(["diagnose", *flags, "--n_probes=16"]) == 2
        line = capsys.readouterr().err
        assert line.startswith("sae_jax: --target = ")
        assert said in line
        assert line.count("\n") == 1
        assert not (tmp_path / "out").exists()
    plain = [f"--{key}={tmp_path / name}" for key, name in {"activations": "x.npy", "workdir": "out"}.items()]
    assert cli.main(["diagnose", *plain, f"--target={tmp_path / 'y.npy'}"]) == 2
    assert "--sae=TRANSCODER beside it" in capsys.readouterr().err
    with pytest.raises(Refused, match="no transcoder"):
        autopsy.dissect(str(tmp_path / "s"), x, target=y)
