"""What share of the SAEs that SAELens lists does `diagnose --sae` take, judged by files in their loaders' layouts?

    pip install -e ".[test]" && python -m experiments.trust.published_saes --out=experiments/trust/published_saes.csv

For every loader × architecture of SAELens' own list (`pretrained_saes.yaml`) a small random SAE is written in that
loader's layout and goes through the command, as a file and, where the loader does not fix its size, as
saelens:RELEASE/ID, downloaded from a server on this machine that speaks the hub's protocol. A kind is taken where every
feature's firing count equals that of `encode` of the SAE as SAELens' own loader makes it from the same files. Exits
with 1 where fewer than 95 % of the list are of a kind that is taken.
"""

import argparse
import csv
import http.server
import json
import os
import re
import sys
import tempfile
import threading
import urllib.parse
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

warnings.filterwarnings("ignore")  # the libraries' own
D, N, K, TOKENS = 16, 64, 5, 2000
FIXED = ("gemma_2", "gemma_2_transcoder", "qwen_scope", "deepseek_r1", "goodfire")  # sizes in the loader's own text
COMMIT = "0" * 40
Kind = tuple[str, str]  # loader, architecture


def kind_of(loader: str, release: str, path: str) -> Kind:
    """The architecture that a loader makes of an SAE, by the names of release and folder."""
    name = f"{release}/{path}".lower()
    if loader == "gemma_3":
        transcoder = "transcoder" in path or "clt" in path
        affine = "affine" in path
        kind = "jumprelu" + (" skip" if affine and transcoder else "") + (" transcoder" if transcoder else "")
        return loader, kind + (", a layer of a cross-layer one" if "clt" in path else "")
    if loader == "gemma_2":
        return loader, "jumprelu of embeddings" if path.startswith("embedding") else "jumprelu"
    if loader == "dictionary_learning_1":
        found = next(known for known in ("matryoshka", "gated", "panneal", "vanilla", "standard", "topk", "andyrdt")
                      if known in name)  # fmt: skip
        classes = {"matryoshka": "MatryoshkaBatchTopKSAE", "gated": "GatedAutoEncoder", "topk": "AutoEncoderTopK",
                   "andyrdt": "BatchTopKSAE"}  # fmt: skip
        return loader, classes.get(found, "AutoEncoder")
    if loader == "sae_lens":
        if "matryoshka" in name:
            return loader, "jumprelu, version 6"
        if "-v5-" in name:
            return loader, "standard that is topk, before version 6"
        return loader, "standard, constant_norm_rescale" if "mistral" in name else "standard, before version 6"
    return loader, {
        "llama_scope": "jumprelu", "llama_scope_r1_distill": "jumprelu", "qwen_scope": "topk", "temporal": "temporal",
        "gemma_2_transcoder": "jumprelu transcoder", "mwhanna_transcoder": "transcoder",
        "mntss_clt_layer_transcoder": "transcoder, a layer of a cross-layer one",
    }.get(loader, "standard")  # fmt: skip


# -- files in the loaders' layouts -----------------------------------------------------------------------------------


def arrays(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Any]:
    """Random tensors; biases of encoders are such that there are features of every fate."""
    import torch

    rng = np.random.default_rng(seed)
    found: dict[str, Any] = {}
    for key, shape in shapes.items():
        value = np.asarray(rng.normal(size=shape) / (np.sqrt(D) if len(shape) > 1 else 1))
        if "threshold" in key and "log" not in key:
            value = np.abs(value)
            if value.ndim:
                value[: N // 2] *= 4
        if ("b_enc" in key or "encoder" in key or "gate_bias" in key) and len(shape) == 1:
            value[: N // 4] -= 9
        found[key] = torch.tensor(value, dtype=torch.float32)
    return found


ROWS = {"encoder.weight": (N, D), "encoder.bias": (N,), "decoder.weight": (D, N)}
COLUMNS = {"W_enc": (D, N), "b_enc": (N,), "W_dec": (N, D), "b_dec": (D,)}


def write(kind: Kind, root: Path, path: str, scaling: float | None) -> Path:
    """The files of an SAE of that kind at a repository's path; returns what --sae is given."""
    import torch
    from safetensors.torch import save_file

    loader, architecture = kind
    place = root / path
    torch_file = loader in ("connor_rob_hook_z", "deepseek_r1", "goodfire", "qwen_scope")
    (place.parent if torch_file or loader == "mwhanna_transcoder" else place).mkdir(parents=True, exist_ok=True)
    if loader in ("gemma_2", "gemma_2_transcoder"):
        np.savez(place / "params.npz", **{k: v.numpy() for k, v in arrays({**COLUMNS, "threshold": (N,)}).items()})
    elif loader == "gemma_3":
        several = "cross-layer" in architecture
        shapes = {**{k.lower(): v for k, v in COLUMNS.items()}, "threshold": (N,)}
        shapes |= {"w_dec": (N, 3, D)} if several else {}
        shapes |= {"affine_skip_connection": (D, D)} if "skip" in architecture else {}
        config = {"architecture": "jump_relu", "model_name": "google/gemma-3-x", "hf_hook_point_in": "in"}
        config |= {"hf_hook_point_out": "out", "affine_connection": "skip" in architecture} if (
            "transcoder" in architecture) else {}  # fmt: skip
        (place / "config.json").write_text(json.dumps(config))
        file = place.with_name(place.name + ".safetensors") if several else place / "params.safetensors"
        save_file(arrays(shapes), file)
        return file
    elif loader == "dictionary_learning_1":
        shapes = {
            "AutoEncoder": {**ROWS, "bias": (D,)}, "AutoEncoderTopK": {**ROWS, "b_dec": (D,)},
            "BatchTopKSAE": {**ROWS, "b_dec": (D,), "threshold": ()},
            "MatryoshkaBatchTopKSAE": {**COLUMNS, "threshold": ()},
            "GatedAutoEncoder": {"encoder.weight": (N, D), "decoder.weight": (D, N), "decoder_bias": (D,),
                                 "r_mag": (N,), "gate_bias": (N,), "mag_bias": (N,)},
        }[architecture]  # fmt: skip
        state = arrays(shapes)
        if "Matryoshka" in architecture:
            state["group_sizes"] = torch.tensor([N // 2, N // 2])
        torch.save(state, place / "ae.pt")
        trainer = {"dict_class": architecture, "activation_dim": D, "dict_size": N, "k": K, "layer": 3,
                   "lm_name": "a/b"}  # fmt: skip
        (place / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
    elif loader == "sae_lens":
        new = "version 6" in architecture and "before" not in architecture
        save_file(arrays({**COLUMNS, **({"threshold": (N,)} if new else {})}), place / "sae_weights.safetensors")
        config = {"d_in": D, "d_sae": N, "dtype": "float32", "hook_point": "blocks.1.hook_resid_pre"}
        if new:
            config |= {"architecture": "jumprelu", "metadata": {"sae_lens_version": "6.5.0"}}
        elif "topk" in architecture:
            config |= {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K},
                       "normalize_activations": "layer_norm"}  # fmt: skip
        elif "rescale" in architecture:
            config |= {"normalize_activations": "constant_norm_rescale"}
        (place / "cfg.json").write_text(json.dumps(config))
    elif loader == "llama_scope":
        (place / "checkpoints").mkdir()
        save_file(arrays({**ROWS, "decoder.bias": (D,)}), place / "checkpoints/final.safetensors")
        config = {"d_model": D, "d_sae": N, "jump_relu_threshold": 0.5, "hook_point_in": "blocks.0.hook_resid_post",
                  "dataset_average_activation_norm": {"in": D**0.5 / (scaling or 1)}}  # fmt: skip
        (place / "hyperparams.json").write_text(json.dumps(config))
    elif loader == "llama_scope_r1_distill":
        save_file(arrays({**ROWS, "decoder.bias": (D,), "log_jumprelu_threshold": (N,)}),
                  place / "sae_weights.safetensors")  # fmt: skip
        config = {"d_model": D, "expansion_factor": N // D, "hook_point_in": "h",
                  "dataset_average_activation_norm": {"in": D**0.5 / (scaling or 1)}}  # fmt: skip
        (place / "config.json").write_text(json.dumps(config))
    elif loader == "qwen_scope":
        torch.save(arrays({**COLUMNS, "W_enc": (N, D), "W_dec": (D, N)}), place)
    elif loader == "goodfire":
        torch.save({k.replace("coder", "coder_linear"): v for k, v in
                    arrays({**ROWS, "decoder.bias": (D,)}).items()}, place)  # fmt: skip
    elif loader == "deepseek_r1":
        torch.save({k: v.bfloat16() for k, v in arrays({**ROWS, "decoder.bias": (D,)}).items()}, place)
    elif loader == "connor_rob_hook_z":
        torch.save(arrays(COLUMNS), place)
        config = {"act_size": D, "dict_size": N, "act_name": "blocks.0.attn.hook_z"}
        Path(f"{str(place).split('.pt')[0]}_cfg.json").write_text(json.dumps(config))
    elif loader == "mwhanna_transcoder":
        save_file(arrays({**COLUMNS, "W_enc": (N, D)}), place)
        values = {"d_model": D, "d_feature": N, "batch_size": 128}
        (root / "wandb-config.yaml").write_text("".join(f"{k}: {{value: {v}}}\n" for k, v in values.items()))
        (root / "config.yaml").write_text("model_name: a/b\n")
    elif loader == "mntss_clt_layer_transcoder":
        place.rmdir()
        state = arrays({"W_enc": (N, D), "b_enc": (N,), "b_dec": (D,), "W_dec": (N, 3, D)})
        save_file({f"W_dec_{path}": state.pop("W_dec")}, root / f"W_dec_{path}.safetensors")
        save_file({f"{key}_{path}": value for key, value in state.items()}, root / f"W_enc_{path}.safetensors")
        (root / "config.yaml").write_text("model_name: a/b\nfeature_input_hook: i\nfeature_output_hook: o\n")
        return root / f"W_enc_{path}.safetensors"
    else:
        (place / "conf.yaml").write_text("llm: {}\n")
    return place


class Hub(http.server.BaseHTTPRequestHandler):
    """Enough of the hub's protocol to download files from a folder of repositories."""

    root = Path()

    def do_GET(self) -> None:
        """A file, or the part of it that is asked for."""
        path = urllib.parse.unquote(self.path.split("?")[0])
        found = re.fullmatch(r"/(.+?)/resolve/main/(.+)", path)
        file = self.root / found[1] / found[2] if found else None
        if file is None or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data, part = file.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d+)?", self.headers.get("Range") or "")
        whole = len(data)
        if part:
            data = data[int(part[1]) : int(part[2] or whole) + 1]
        self.send_response(206 if part else 200)
        tag = f'"{abs(hash((file, whole)))}"'
        for key, value in {"Content-Length": len(data), "ETag": tag, "X-Repo-Commit": COMMIT}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


def counted_by_saelens(loader: str, release: str, ident: str, x: np.ndarray) -> np.ndarray:
    """Firing counts of `encode` of the SAE that SAELens' loader makes of the files, small as they are."""
    import torch
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from sae_lens.loading.pretrained_saes_directory import get_norm_scaling_factor, get_repo_id_and_folder_name

    repository, folder = get_repo_id_and_folder_name(release, ident)
    overrides = loaders.get_config_overrides(release, ident) | {"device": "cpu", "dtype": "float32"}
    overrides |= {"d_in": D, "d_sae": N} if loader in FIXED else {}
    overrides |= {"d_out": D} if loader == "gemma_2_transcoder" else {}
    config, state, _ = loaders.NAMED_PRETRAINED_SAE_LOADERS[loader](repository, folder, "cpu", False, overrides)
    config = loaders.handle_config_defaulting(config)
    config = SAE.get_sae_config_class_for_architecture(config["architecture"]).from_dict(config)
    sae = SAE.get_sae_class_for_architecture(config.architecture())(config)
    sae.load_state_dict(state)
    scaling = get_norm_scaling_factor(release, ident)
    if config.normalize_activations == "expected_average_only_in" and scaling is not None:
        sae.fold_activation_norm_scaling_factor(scaling)
    sae = sae.to(torch.float32)
    with torch.no_grad():
        tokens = torch.from_numpy(x)
        heads = tokens.reshape(len(x), 2, D // 2) if config.reshape_activations == "hook_z" else tokens
        return (sae.encode(heads).numpy() != 0).sum(axis=0)


def counted_by_us(given: str, folder: Path) -> np.ndarray | str:
    """Firing counts in features.csv of the command; its one line where it refuses."""
    import contextlib
    import io

    from sae_jax import cli

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = cli.main(["diagnose", f"--sae={given}", f"--activations={folder}/x.npy", f"--workdir={folder}/report",
                         "--n_probes=16"])  # fmt: skip
    if code:
        return said.getvalue().strip().replace(str(folder), "…")
    rows = csv.DictReader((folder / "report/features.csv").read_text().splitlines())
    return np.array([int(row["n_fired"]) for row in rows])


def outcome(found: np.ndarray | str, expected: np.ndarray) -> str:
    """`equal`, or what is wrong."""
    if isinstance(found, str):
        return found
    if found.shape != expected.shape:
        return "nothing to compare with"
    return "equal" if np.array_equal(found, expected) else f"{int((found != expected).sum())} counts differ"


def main(argv: list[str]) -> int:
    """Prints a row for each kind, and the share that is taken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="")
    given = parser.parse_args(argv)
    scratch = tempfile.TemporaryDirectory()
    folder = Path(scratch.name)
    Hub.root = folder / "hub"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # Read when huggingface_hub is imported, so everything that imports it comes later.
    os.environ |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(folder / "cache"),
                   "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # fmt: skip
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    kinds: dict[Kind, list[tuple[str, str]]] = defaultdict(list)
    directory = get_pretrained_saes_directory()
    for release, lookup in directory.items():
        for ident, path in lookup.saes_map.items():
            loader = lookup.conversion_func or "sae_lens"
            kinds[kind_of(loader, release, path)].append((release, ident))
    rng = np.random.default_rng(0)
    x = np.asarray(rng.normal(size=(TOKENS, D)) * np.geomspace(1, 0.3, D) + rng.normal(size=D), np.float32)
    np.save(folder / "x.npy", x)
    rows, taken, total = [], 0, sum(map(len, kinds.values()))
    for kind, members in sorted(kinds.items(), key=lambda item: -len(item[1])):
        release, ident = members[0]
        lookup = directory[release]
        path = write(kind, Hub.root / lookup.repo_id, lookup.saes_map[ident], lookup.norm_scaling_factor.get(ident))
        try:
            expected = counted_by_saelens(kind[0], release, ident, x)
        except Exception as error:
            expected = np.zeros(0)
            print(f"SAELens: {type(error).__name__}: {error}", file=sys.stderr)
        local = outcome(counted_by_us(str(path), folder), expected)
        name = f"saelens:{release}/{ident}"
        hub = "size fixed" if kind[0] in FIXED else outcome(counted_by_us(name, folder), expected)
        fine = local == "equal" and hub in ("equal", "size fixed")
        taken += len(members) * fine
        rows.append({"loader": kind[0], "architecture": kind[1], "saes": len(members), "file": local,
                     "saelens": hub, "taken": fine, "dead": f"{np.mean(expected == 0):.2f}"})  # fmt: skip
        print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    print(f"taken: {taken} of {total} SAEs, {100 * taken / total:.2f} %")
    for row in rows:
        if not row["taken"]:
            print(f"not taken: {row['loader']}, {row['architecture']}, {row['saes']} SAEs")
    if given.out:
        with open(given.out, "w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    server.shutdown()
    scratch.cleanup()
    return 0 if taken >= 0.95 * total else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
