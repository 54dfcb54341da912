"""SAEs that leave and come: out of a run or a folder, into the format of another library, onto the Hugging Face hub."""

import json
import os
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from sae_jax import config as config_lib
from sae_jax.autoencoder import death
from sae_jax.autoencoder.dense import DenseSAE
from sae_jax.autoencoder.sae import SAE
from sae_jax.errors import Refused
from sae_jax.exchange import dictionary_learning, formats, hub, origin, registry, saelens
from sae_jax.exchange import encoders as encoders_lib
from sae_jax.exchange.encoders import Opened
from sae_jax.exchange.formats import Packed
from sae_jax.outliers import selections
from sae_jax.outliers.preprocess import Preprocessing, fold
from sae_jax.reports import tables
from sae_jax.runtime import checkpoint, disk
from sae_jax.runtime import workdir as workdir_lib
from sae_jax.training import step as step_lib

SAID = ("model_name", "hook_name", "layer", "context_size", "prepend_bos")  # of `export`: where an SAE comes from
PICTURES = {
    "deaths.png": "Features dead over the run, by pathway.",
    "bias.png": "How the decoder bias comes to the mean of the activations.",
    "shifts.png": "Each feature's mean pre-activation over its standard deviation, coloured by its fate.",
}


def load(path: str | os.PathLike[str], member: str | None = None) -> Packed | Opened:
    """An SAE: a member of a run of ours, or anybody's that `diagnose --sae` takes.

        sae, before, metadata = sae_jax.load("runs/mine", "centred")
        codes = sae_jax.encode(sae, before(x))                  # x of shape (tokens, d_model)
        x_hat = before.invert(sae_jax.decode(sae, codes))

    `sae_jax.features` and `sae_jax.reconstruct` do all of that for any number of tokens, and undo a norm of each token.

    Args:
      path: a workdir (its newest checkpoint is read), the folder or file of an SAE, hf://OWNER/NAME/PLACE or
        saelens:RELEASE/ID.
      member: which SAE of a run that trained several.

    Returns:
      Of a TopK SAE: the SAE (of JAX arrays), its preprocessing and its metadata. Of another kind (BatchTopK, JumpReLU,
      ReLU, gated, …), of a run as well: an `Opened`, whose `encoder` has arrays and rule (`exchange/encoders.py`);
      `features`, `reconstruct` and `dissect` take it alike. Metadata of a run: `step`, `gamma`, `gamma_raw`,
      `gamma_direction`, `mu` (of the activations as they are), `init` and `final` as in report.json, `config`, …

    Raises:
      Refused: there is nothing like that; see `registry.read`.
    """
    found, _ = _read(os.fspath(path), member)
    if isinstance(found, Packed) and isinstance(found.sae, DenseSAE):
        found = opened(found)
    if isinstance(found, Opened):
        if found.encoder.rule != "topk" or not formats.is_ours(found):
            return found._replace(encoder=jax.tree.map(jnp.asarray, found.encoder))
        found = formats.as_ours(found, os.fspath(path))
    return found._replace(sae=jax.tree.map(jnp.asarray, found.sae))


def _read(path: str, member: str | None) -> tuple[Packed | Opened, np.ndarray | None]:
    """A member of a run as we pack it and how long its features were silent, or somebody else's SAE as it is."""
    if path.startswith(saelens.HUB):
        return saelens.from_release(path), None
    if path.startswith(hub.HUB):
        path = hub.fetch(path)
    disk.check_reachable("--sae", path)
    folder = epath.Path(path)
    if not (folder / checkpoint.FOLDER).is_dir() or registry.is_sae(folder):  # Llama Scope has checkpoints too
        return registry.read(folder), None
    saved = checkpoint.saved(str(folder))
    return _unpacked(saved, member, _facts(folder))


def opened(sae: str | os.PathLike[str] | SAE | Packed | Opened, member: str | None = None) -> Opened:
    """Anybody's SAE of any kind that is supported, in its own arithmetic; ours with its preprocessing folded in."""
    found, silent = sae, None
    if isinstance(sae, str | os.PathLike):
        found, silent = _read(os.fspath(sae), member)
    if isinstance(found, Opened):
        return found
    packed = packed_of(found)
    encoder = encoders_lib.of_sae(formats.folded(packed), packed.before.norm)
    unset = isinstance(packed.sae, DenseSAE) and packed.sae.activation == "batch_topk" and packed.sae.threshold < 0
    notes = ("Its threshold was never set, so every positive feature fires.",) if unset else ()
    return Opened(encoder, packed.metadata, "sae_jax", notes, tokens_since_fired=silent)


def packed_of(sae: str | os.PathLike[str] | SAE | Packed | Opened, member: str | None = None) -> Packed:
    """An SAE with its preprocessing: of what `load` takes or returns, or an SAE that takes activations as they are."""
    if isinstance(sae, SAE):
        own: SAE = jax.tree.map(lambda a: np.asarray(a, np.float32), sae)
        return Packed(own, Preprocessing(shift=np.zeros(own.b_dec.shape)), {})
    name = "sae" if isinstance(sae, Packed | Opened) else os.fspath(sae)
    found = sae if isinstance(sae, Packed | Opened) else _read(name, member)[0]
    return formats.as_ours(found, name) if isinstance(found, Opened) else found


def export(
    sae: str | SAE | Packed | Opened, out: str, format: str = "saelens", *, member: str | None = None,
    push: str | None = None, model_name: str | None = None, hook_name: str | None = None, layer: int | None = None,
    context_size: int | None = None, prepend_bos: bool | None = None,
) -> Packed | Opened:  # fmt: skip
    """Writes an SAE in the format of another library, with a model card; `out` appears once it is complete.

    Names of files and folders of this machine are left out of all that is written.

    Args:
      sae: what `load` takes, with `member`, or returns; or an SAE.
      out: a new or empty folder, or one that holds this very export, which is left as it is.
      format: saelens | dictionary_learning | sparsify.
      push: OWNER/NAME of a repository on the Hugging Face hub that gets the folder too, under its own name, in one
        commit. Needs the extra `hub`, and a token as huggingface_hub finds it.
      model_name, hook_name, layer, context_size, prepend_bos (whether sequences began with a BOS token): what the SAE
        is of, where its metadata do not say or say otherwise. A hook point may be given as any library spells it; each
        gets its own spelling, and the layer is read off it.

    Returns:
      What was written, as `load` returns it.

    Raises:
      Refused: something about the input, or the hub cannot be reached; nothing was written.
      RunFailed: the upload broke off; the folder is complete and the repository without it.
    """
    if format not in formats.FORMATS:
        raise Refused("--format", format, "one of " + ", ".join(formats.FORMATS))
    target = epath.Path(out)
    if target.exists() and not target.is_dir():
        raise Refused("--out", out, "a folder that does not exist yet, or is empty")
    packed = packed_of(sae, member)
    said = dict(zip(SAID, (model_name, hook_name, layer, context_size, prepend_bos), strict=True))
    packed = packed._replace(metadata=origin.described(packed.metadata, said))
    files = formats.encode(packed, format)
    run = epath.Path(sae) if isinstance(sae, str) and not sae.startswith((hub.HUB, saelens.HUB)) else None
    pictures = {name: (run / name).read_bytes() for name in PICTURES if run and (run / name).exists()}
    files |= pictures | {"README.md": model_card(packed, format, target.name, pictures).encode()}
    inside = list(target.iterdir()) if target.exists() else []
    if inside and files != {path.name: path.read_bytes() if path.is_file() else None for path in inside}:
        raise Refused("--out", out, "a folder that does not exist yet, is empty, or holds this very export")
    api = hub.repository(push) if push else None
    if not inside:
        _write(target, files)
    if push:
        hub.commit(api, push, target)
    return opened(packed) if isinstance(packed.sae, DenseSAE) else packed


def _write(target: epath.Path, files: dict[str, bytes]) -> None:
    partial = target.parent / (target.name + ".partial")
    try:
        if partial.exists():  # of an export that was killed
            partial.rmtree()
        partial.mkdir(parents=True)
    except OSError as error:
        raise disk.unwritable("--out", str(target), error) from error
    for name, content in files.items():
        (partial / name).write_bytes(content)
    if target.exists():
        target.rmdir()
    partial.rename(target)


# -- out of a run ----------------------------------------------------------------------------------------------------


def _unpacked(saved: checkpoint.Saved, member: str | None, facts: dict[str, Any]) -> tuple[Packed, np.ndarray]:
    """One member of a checkpoint, with what all tokens went through (a norm, a scalar) as preprocessing."""
    config = config_lib.from_identity(saved.identity, saved.history[-1]["members"])
    members = config_lib.members(config)
    name = next(iter(members)) if member is None and len(members) == 1 else member
    if name not in members:
        raise Refused("--member", member, "one of " + ", ".join(members))
    mu, scale = np.asarray(saved.statistics["mu"], np.float64), float(saved.statistics["scale"])
    groups = step_lib.group_members(members, len(mu))
    number, place = next((i, g.names.index(name)) for i, g in enumerate(groups) if name in g.names)
    group = saved.groups[number]
    kind = members[name].sae
    arrays = {key: np.asarray(value[place]) for key, value in group["sae"].items() if value is not None}
    sae = SAE(**arrays, k=kind.k) if kind.activation == "topk" else DenseSAE(
        **arrays, k=kind.k, activation=kind.activation)  # fmt: skip
    before = Preprocessing(shift=np.zeros_like(mu), scale=scale, norm=config.data.norm)
    gammas = dict(zip(("gamma", "gamma_raw", "gamma_direction"), saved.statistics["gammas"].tolist(), strict=True))
    own: dict[str, Any] = {key: np.asarray(value[place]) for key, value in (group["hyper"].get("before") or {}).items()
           if value is not None}  # fmt: skip
    if members[name].sae.whiten:
        sae = fold(sae, Preprocessing(**own))
    elif own:  # this member's tokens have a mean of their own
        mu = mu - np.asarray(own["shift"], np.float64) / scale
        gammas = {"gamma_raw": float(np.linalg.norm(mu)) * scale / np.sqrt(len(mu))}
    final = saved.history[-1]["members"][name]
    versions = tables.versions()
    metadata = {
        **origin.of_run(config, facts),
        **gammas,
        "mu": np.float32(mu).tolist(),
        "member": name,
        "step": saved.step,
        "tokens": saved.step * config.train.batch_size,
        "scale": scale,
        "init": saved.history[0]["members"][name],
        "final": final,
        "num_dead_features": round(final["dead_total"] * members[name].sae.n_features),
        "num_dead_by_relu": round(final["dead_by_relu"] * members[name].sae.n_features),
        "l0": final["l0"],
        "trained_with": f"sae-jax {versions.get('sae-jax', '')}",
        "config": {key: v for key, v in config_lib.identity(members[name]).items() if not key.startswith("members")},
    }
    packed = Packed(sae, before, json.loads(json.dumps(tables.finite(metadata))))
    return packed, np.asarray(group["tokens_since_fired"][place])


def _facts(folder: epath.Path) -> dict[str, Any]:
    """What a run says of its data: in its report, or, before it is finished, where it began."""
    if (folder / "report.json").exists():
        return disk.read_json("--workdir", folder / "report.json").get("data", {})
    return disk.read_json("--workdir", folder / workdir_lib.DATA) if (folder / workdir_lib.DATA).exists() else {}


# -- the card --------------------------------------------------------------------------------------------------------

LOADING = {
    "saelens": 'from sae_lens import SAE\nsae = SAE.load_from_disk("{folder}")',
    "dictionary_learning": "from dictionary_learning.{place} import {kind}\n"
    'sae = {kind}.from_pretrained("{folder}/ae.pt")',
    "sparsify": 'from sparsify import SparseCoder\nsae = SparseCoder.load_from_disk("{folder}")',
}


KEPT = {  # which features are kept
    "topk": "among the k largest pre-activations **and** above 0", "batch_topk": "above the SAE's threshold",
    "jumprelu": "above a threshold of their own", "relu": "above 0",
}  # fmt: skip


def model_card(packed: Packed, format: str, name: str, pictures: Iterable[str] = ()) -> str:
    """README.md of an exported SAE: what it is, how to load it, what is dead in it and why, where it comes from."""
    sae, known = packed.sae, packed.metadata
    n, d = sae.W_enc.shape[0], packed.before.shift.shape[0]
    activation = sae.activation if isinstance(sae, DenseSAE) else "topk"
    kind, k = selections.NAMES[activation], f"k = {sae.k}, " if sae.k else ""
    loading = LOADING[format].format(folder=name, **dictionary_learning.loaded_by(sae, known))
    of = f"`{known['model_name']}`, `{known.get('hook_name')}`" if known.get("model_name") else "activations"
    lines = [
        "---",
        f"library_name: {format}",
        "tags: [sparse-autoencoder, interpretability, sae-jax]",
        "---",
        "",
        f"# {name}",
        "",
        f"A {kind} sparse autoencoder on {of}: {n} features, {k}d_model = {d}, in the format of {format}.",
        "",
        "```python",
        *loading.splitlines(),
        "```",
        "",
        "Scaling, centring and whitening are folded into the weights: it takes activations as they are."
        if packed.before.norm == "none"
        else f"Each token goes through `{formats.NORM_FLAGS[packed.before.norm][0]}`, as the configuration says.",
        f"Features are kept where they are {KEPT[activation]}.",
    ]
    if known.get("final"):
        rows = [known["init"], known["final"]]
        shown = [key for key in tables.COLUMNS if key in rows[0]]
        lines += [
            "",
            "## Features that never fire",
            "",
            f"On held-out tokens, whose gamma ‖mu‖ / ‖sigma‖ is {known['gamma_raw']:.2f}"
            + (f", and {known['gamma']:.2f} after LayerNorm." if "gamma" in known else "."),
            "",
            "| step | " + " | ".join(tables.title(key, death.pathway(activation)) for key in shown) + " |",
            "| --- |" + " --- |" * len(shown),
            *(
                f"| {step} | " + " | ".join(tables.cell(key, row[key]) for key in shown) + " |"
                for step, row in zip((0, known["step"]), rows, strict=True)
            ),
            "",
            f"{known['num_dead_features']} of {n} features are dead, {known['num_dead_by_relu']} of them by ReLU "
            f"(pre-activation never above 0), the others by {death.pathway(activation)} (never kept). The decoder bias "
            f"has {tables.cell('bias_projection', known['final']['bias_projection'])} of the mean (b·mu/‖mu‖²).",
        ]
    if pictures:
        member = f" This SAE is the member `{known['member']}`." if known.get("member") else ""
        lines += ["", f"## The run it comes from\n\nAll SAEs that were trained side by side.{member}"]
        lines += [f"\n![]({picture})\n\n*{PICTURES[picture]}*" for picture in pictures]
    if known.get("config"):
        settings = ", ".join(f"`{key}={value}`" for key, value in origin.applied(known["config"]).items())
        lines += ["", "## Settings", "", f"{known['trained_with']}, {known['tokens']} tokens. {settings}"]
    return "\n".join(lines) + "\n"
