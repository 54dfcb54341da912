"""What the verbs do with activations as people have them: every number held against an independent count in NumPy.

    python -m experiments.trust.containers --workdir=runs/containers

Writes each of the containers of `TABLE`, extracts it, diagnoses it (with a count of deaths) and trains on it, and
compares rows, places, gammas, deaths and FVE with those of the array that it was made of. Prints a line a container and
writes containers.csv; ends with exit code 1 where anything differs. Figures are not drawn.
"""

import csv
import json
import shutil
import sys
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pyarrow
import pyarrow.parquet
from absl import flags, logging
from safetensors.flax import save_file

import sae_jax
from experiments import command
from sae_jax.activations import files, store
from sae_jax.activations.chunks import split_chunks
from sae_jax.autoencoder import sae as sae_lib
from sae_jax.config import base
from sae_jax.runtime.optional import module
from sae_jax.training import run as run_lib

ONLY = flags.DEFINE_string("only", "", "containers whose names have this in them")

N, T, D = 12, 20, 6
LENGTHS = np.array([10, 20, 7, 5, 1, 20, 13, 2, 19, 20, 11, 3])
MASK = np.arange(T) < LENGTHS[:, None]
IDS = np.arange(N * T).reshape(N, T) % 97
FLAT = {"token_id": IDS.ravel(), "sequence_id": np.repeat(np.arange(N), T), "position": np.tile(np.arange(T), N)}
REAL = {name: values[MASK.ravel()] for name, values in FLAT.items()}
NO_IDS = REAL | {"token_id": np.full(MASK.sum(), -1)}
UNKNOWN = {"token_id": np.full(N * T, -1)}


def rows(x):
    """Tokens end to end."""
    return x.reshape(-1, D)


def torch_save(value, path):
    """An array, or a dictionary of arrays, as PyTorch saves it."""
    torch = module("torch", "hf")
    torch.save({k: torch.from_numpy(np.array(v)) for k, v in value.items()} if isinstance(value, dict)
               else torch.from_numpy(value), path)  # fmt: skip


def zarr(folder, array, cut=7):
    """An array of version 2, written here by hand: its chunks are raw bytes, the last one padded."""
    folder.mkdir(parents=True)
    chunks = (cut, *array.shape[1:])
    about = {"zarr_format": 2, "shape": array.shape, "chunks": chunks, "dtype": array.dtype.str, "compressor": None,
             "fill_value": 0, "order": "C", "filters": None}  # fmt: skip
    (folder / ".zarray").write_text(json.dumps(about))
    for number in range(-(-len(array) // cut)):
        chunk = np.zeros(chunks, array.dtype)
        part = array[number * cut : (number + 1) * cut]
        chunk[: len(part)] = part
        (folder / ".".join([str(number)] + ["0"] * (array.ndim - 1))).write_bytes(chunk.tobytes())
    return folder


def zarr_group(folder, **arrays):
    """Several arrays of version 2 in a group."""
    for name, array in arrays.items():
        zarr(folder / name, np.ascontiguousarray(array))
    (folder / ".zgroup").write_text('{"zarr_format": 2}')
    return folder


def zarr_3(folder, x):
    """An array of version 3, in compressed chunks."""
    import tensorstore

    store = tensorstore.open({
        "driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder / "x.zarr")},
        "metadata": {"shape": x.shape, "data_type": "float32", "codecs": [{"name": "blosc"}],
                     "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [5, T, D]}}},
    }, create=True).result()  # fmt: skip
    store.write(x).result()
    return folder / "x.zarr"


def shards(save, ending):
    """Five files of different lengths, numbered with gaps."""
    def make(folder, x):
        (folder / "s").mkdir()
        for number, part in enumerate(np.split(rows(x), [50, 60, 61, 200])):
            save(folder / "s" / f"part_{number * 3}{ending}", part)
        return folder / "s"

    return make


def arrow_folder(folder, columns, parts=(5, 4, 3)):
    """What `save_to_disk` leaves: streams of record batches, and a list of them."""
    folder.mkdir(parents=True)
    names, start = [], 0
    table = pyarrow.table(columns)
    for number, count in enumerate(parts):
        names.append({"filename": f"data-{number:05d}.arrow"})
        with pyarrow.ipc.new_stream(folder / names[-1]["filename"], table.schema) as writer:
            writer.write_table(table.slice(start, count), max_chunksize=2)
        start += count
    (folder / "state.json").write_text(json.dumps({"_data_files": names}))
    return folder


def sequences(x, lengths=LENGTHS):
    """Lists without the padding."""
    return [part[:length].tolist() for part, length in zip(x, lengths, strict=True)]


FLOATS = pyarrow.list_(pyarrow.list_(pyarrow.float32()))


def ragged(x):
    """Columns of sequences of different lengths, with token ids."""
    return {"acts": pyarrow.array(sequences(x), FLOATS), "input_ids": pyarrow.array(sequences(IDS))}


def parquet(path, columns, **options):
    """One Parquet file."""
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def saved(save, name):
    """One file."""
    def make(folder, x):
        save(folder / name, x)
        return folder / name

    return make


def npz(**beside):
    """Saves with other arrays beside."""
    return lambda path, x: np.savez(path, acts=x, **beside)


def beside(name, values):
    """A .npy file, with another beside it."""
    def make(folder, x):
        np.save(folder / "x.npy", x)
        np.save(folder / f"x{name}.npy", values)
        return folder / "x.npy"

    return make


def dictionary(folder, x):
    """A DatasetDict of two splits; the path of one."""
    for split in ("train", "test"):
        arrow_folder(folder / "d" / split, ragged(x if split == "train" else -x))
    (folder / "d" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    return f"{folder}/d::train"


def named(path, name):
    """One of several at a path."""
    return lambda folder, x: f"{path(folder, x)}::{name}"


def bits(x):
    """bfloat16 as unsigned integers."""
    return x.astype(ml_dtypes.bfloat16).view(np.uint16)


HALF = "bfloat16"
# name → how it is made, the tokens that are there (all, or those of the mask), what is known of them.
TABLE = {
    "npy": (saved(lambda p, x: np.save(p, rows(x)), "x.npy"), None, UNKNOWN),
    "npy float64": (saved(lambda p, x: np.save(p, rows(x).astype(np.float64)), "x.npy"), None, UNKNOWN),
    "npy big-endian": (saved(lambda p, x: np.save(p, rows(x).astype(">f4")), "x.npy"), None, UNKNOWN),
    "npy Fortran": (saved(lambda p, x: np.save(p, np.asfortranarray(rows(x))), "x.npy"), None, UNKNOWN),
    "npy bfloat16": (saved(lambda p, x: np.save(p, np.asarray(jnp.asarray(rows(x), HALF))), "x.npy"), HALF, UNKNOWN),
    "npy bits": (named(saved(lambda p, x: np.save(p, bits(rows(x))), "x.npy"), "@bfloat16"), HALF, UNKNOWN),
    "npy 3-D": (saved(np.save, "x.npy"), None, FLAT | UNKNOWN),
    "npy 3-D Fortran": (saved(lambda p, x: np.save(p, np.asfortranarray(x)), "x.npy"), None, FLAT | UNKNOWN),
    "npy 3-D bfloat16": (saved(lambda p, x: np.save(p, x.astype(HALF)), "x.npy"), HALF, FLAT | UNKNOWN),
    "npy 3-D, a mask beside": (beside(".mask", MASK), MASK, NO_IDS),
    "npy 3-D, an attention mask": (beside("_attention_mask", MASK.astype(int)), MASK, NO_IDS),
    "npy 3-D, lengths beside": (beside("_lengths", LENGTHS), MASK, NO_IDS),
    "npy 3-D, token ids beside": (beside(".token_ids", IDS), None, FLAT),
    "npz": (saved(lambda p, x: np.savez(p, rows(x)), "x.npz"), None, UNKNOWN),
    "npz 3-D, token ids": (saved(npz(token_ids=IDS), "x.npz"), None, FLAT),
    "npz 3-D, ids and mask": (saved(npz(input_ids=IDS, attention_mask=MASK), "x.npz"), MASK, REAL),
    "npz 3-D, ids and lengths": (saved(npz(tokens=IDS, lengths=LENGTHS), "x.npz"), MASK, REAL),
    "npz compressed": (saved(lambda p, x: np.savez_compressed(p, acts=x, ids=IDS), "x.npz"), None, FLAT),
    "npz one of several": (
        named(saved(lambda p, x: np.savez(p, resid=x, mlp=-x, input_ids=IDS), "x.npz"), "resid"), None, FLAT),
    "npz 2-D, token ids": (saved(lambda p, x: np.savez(p, a=rows(x), token_ids=IDS.ravel()), "x.npz"), None,
                           {"token_id": FLAT["token_id"]}),
    "npz 2-D, lengths": (
        saved(lambda p, x: np.savez(p, a=x[MASK], lengths=LENGTHS, token_ids=IDS[MASK]), "x.npz"), MASK, REAL),
    "npz bits": (named(saved(lambda p, x: np.savez(p, a=bits(x), b=IDS), "x.npz"), "a@bfloat16"), HALF, FLAT | UNKNOWN),
    "safetensors": (saved(lambda p, x: save_file({"a": jnp.asarray(rows(x))}, p), "x.safetensors"), None, UNKNOWN),
    "safetensors bfloat16": (
        saved(lambda p, x: save_file({"a": jnp.asarray(rows(x), HALF)}, p), "x.safetensors"), HALF, UNKNOWN),
    "safetensors 3-D, ids and mask": (
        saved(lambda p, x: save_file(
            {"a": jnp.asarray(x), "input_ids": jnp.asarray(IDS), "mask": jnp.asarray(MASK)}, p
        ), "x.safetensors"), MASK, REAL),
    "safetensors one of several": (named(
        saved(lambda p, x: save_file({"a": jnp.asarray(x), "b": -jnp.asarray(x)}, p), "x.safetensors"), "a"),
        None, FLAT | UNKNOWN),
    "pt": (saved(lambda p, x: torch_save(rows(x), p), "x.pt"), None, UNKNOWN),
    "pt 3-D": (saved(lambda p, x: torch_save(x, p), "x.pt"), None, FLAT | UNKNOWN),
    "pt 3-D, ids and mask": (
        saved(lambda p, x: torch_save({"acts": x, "input_ids": IDS, "attention_mask": MASK}, p), "x.pt"), MASK, REAL),
    "pt one of several": (
        named(saved(lambda p, x: torch_save({"a": x, "b": -x}, p), "x.pt"), "a"), None, FLAT | UNKNOWN),
    "zarr": (lambda f, x: zarr(f / "x.zarr", rows(x)), None, UNKNOWN),
    "zarr 3-D of version 3": (zarr_3, None, FLAT | UNKNOWN),
    "zarr group, ids and mask": (
        lambda f, x: zarr_group(f / "g", acts=x, input_ids=IDS, attention_mask=MASK.astype(int)), MASK, REAL),
    "zarr one of several": (
        named(lambda f, x: zarr_group(f / "g", resid=rows(x), mlp=-rows(x)), "resid"), None, UNKNOWN),
    "folder of npy": (shards(lambda p, x: np.save(p, x), ".npy"), None, UNKNOWN),
    "folder of safetensors": (
        shards(lambda p, x: save_file({"a": jnp.asarray(x)}, p), ".safetensors"), None, UNKNOWN),
    "folder of pt": (shards(lambda p, x: torch_save(np.array(x), p), ".pt"), None, UNKNOWN),
    "folder of parquet": (shards(lambda p, x: parquet(p, {"x": x.tolist()}), ".parquet"), None, UNKNOWN),
    "pattern of npy": (lambda f, x: shards(lambda p, x: np.save(p, x), ".npy")(f, x) / "part_*.npy", None, UNKNOWN),
    "save_to_disk": (lambda f, x: arrow_folder(f / "a", ragged(x)), MASK, REAL),
    "save_to_disk, vectors": (
        lambda f, x: arrow_folder(f / "a", {"v": rows(x).tolist(), "input_ids": IDS.ravel()}, (100, 140)), None,
        {"token_id": FLAT["token_id"]}),
    "save_to_disk, padded": (
        lambda f, x: arrow_folder(f / "a", {"v": pyarrow.array(x.tolist(), FLOATS), "ids": IDS.tolist(),
                                            "attention_mask": MASK.astype(int).tolist()}), MASK, REAL),
    "save_to_disk, a column of several": (
        named(lambda f, x: arrow_folder(f / "a", {**ragged(x), "other": pyarrow.array(sequences(-x))}), "acts"),
        MASK, REAL),
    "DatasetDict": (dictionary, MASK, REAL),
    "parquet": (lambda f, x: parquet(f / "x.parquet", ragged(x), row_group_size=5), MASK, REAL),
    "parquet, vectors": (
        lambda f, x: parquet(
            f / "x.parquet", {"v": pyarrow.array(rows(x).tolist(), pyarrow.list_(pyarrow.float32(), D)),
                              "token_id": IDS.ravel()}, row_group_size=64), None,
        {"token_id": FLAT["token_id"]}),
}  # fmt: skip


def half(x):
    """Tokens as float16."""
    return rows(x).astype(np.float16)


def ours(dtype, name="npz 3-D, ids and mask"):
    """A dataset that `extract` wrote of another container."""
    return lambda folder, x: store.import_file(str(TABLE[name][0](folder, x)), str(folder / "data"), dtype)


def nested(kind, large=False):
    """Sequences of vectors, of a number format, of fixed width or as large lists."""
    one = pyarrow.large_list if large else pyarrow.list_
    return one(one(kind))


def one_file(folder, x):
    """A folder that holds one file."""
    (folder / "alone").mkdir()
    np.save(folder / "alone" / "acts.npy", rows(x))
    return folder / "alone"


def shards_of_sequences(masked):
    """Three files of sequences, each with its own mask where asked for."""
    def make(folder, x):
        (folder / "s").mkdir()
        for number, part in enumerate(np.split(np.arange(N), [3, 8])):
            np.save(folder / "s" / f"acts_{number}.npy", x[part])
            if masked:
                np.save(folder / "s" / f"acts_{number}_mask.npy", MASK[part])
        return folder / "s"

    return make


def with_ids(folder, x):
    """Shards whose token ids lie in the same file."""
    (folder / "s").mkdir()
    for number, part in enumerate(np.split(np.arange(N), [3, 8])):
        tensors = {"acts": jnp.asarray(x[part]), "token_ids": jnp.asarray(IDS[part])}
        save_file(tensors, folder / "s" / f"{number}.safetensors")
    return folder / "s"


FIRST = np.zeros((N, T), bool)
FIRST[:, 0] = True
HALVES, DOUBLES = "float16", "float64"
STILL = "still"  # the third dimension is the same on every token
LEFT = MASK[:, ::-1]
TABLE |= {
    "npy float16": (saved(lambda p, x: np.save(p, half(x)), "x.npy"), HALVES, UNKNOWN),
    "npy 3-D float16": (saved(lambda p, x: np.save(p, x.astype(np.float16)), "x.npy"), HALVES, FLAT | UNKNOWN),
    "npy 3-D float64": (saved(lambda p, x: np.save(p, x.astype(np.float64)), "x.npy"), None, FLAT | UNKNOWN),
    "npy 3-D, padded on the left": (beside(".mask", LEFT), LEFT, {
        key: values[LEFT.ravel()] for key, values in FLAT.items() if key != "token_id"}),
    "npy, a dimension that does not vary": (
        saved(lambda p, x: np.save(p, np.where(np.arange(D) == 2, np.float32(3), rows(x))), "x.npy"), STILL, UNKNOWN),
    "npz float16": (saved(lambda p, x: np.savez(p, half(x)), "x.npz"), HALVES, UNKNOWN),
    "npz 3-D": (saved(lambda p, x: np.savez(p, x), "x.npz"), None, FLAT | UNKNOWN),
    "npz 3-D, mask": (saved(npz(mask=MASK), "x.npz"), MASK, NO_IDS),
    "npz 3-D, lengths": (saved(npz(seq_lens=LENGTHS), "x.npz"), MASK, NO_IDS),
    "npz 3-D, mask and lengths": (saved(npz(mask=np.ones((N, T), bool), length=LENGTHS), "x.npz"), MASK, NO_IDS),
    "npz, first tokens left out": (
        named(saved(npz(token_ids=IDS), "x.npz"), "?without=first"), ~FIRST,
        {key: values[~FIRST.ravel()] for key, values in FLAT.items()}),
    "npz, token ids left out": (
        named(saved(npz(token_ids=IDS), "x.npz"), "acts?without=id=3,id=17"), ~np.isin(IDS, (3, 17)),
        {key: values[~np.isin(IDS, (3, 17)).ravel()] for key, values in FLAT.items()}),
    "safetensors float16": (saved(lambda p, x: save_file({"a": jnp.asarray(half(x))}, p), "x.safetensors"), HALVES,
                            UNKNOWN),
    "safetensors 3-D": (saved(lambda p, x: save_file({"a": jnp.asarray(x)}, p), "x.safetensors"), None, FLAT | UNKNOWN),
    "safetensors 3-D, lengths": (
        saved(lambda p, x: save_file({"a": jnp.asarray(x), "lengths": jnp.asarray(LENGTHS)}, p), "x.safetensors"),
        MASK, NO_IDS),
    "safetensors 3-D bfloat16, ids": (
        saved(lambda p, x: save_file({"a": jnp.asarray(x, HALF), "ids": jnp.asarray(IDS)}, p), "x.safetensors"), HALF,
        FLAT),
    "pt float16": (saved(lambda p, x: torch_save(half(x), p), "x.pt"), HALVES, UNKNOWN),
    "pt float64": (saved(lambda p, x: torch_save(rows(x).astype(np.float64), p), "x.pt"), None, UNKNOWN),
    "pt 3-D, lengths": (saved(lambda p, x: torch_save({"acts": x, "lengths": LENGTHS}, p), "x.pt"), MASK, NO_IDS),
    "pth": (saved(lambda p, x: torch_save(rows(x), p), "x.pth"), None, UNKNOWN),
    "folder of one npy": (one_file, None, UNKNOWN),
    "folder of npz": (shards(lambda p, x: np.savez(p, x), ".npz"), None, UNKNOWN),
    "folder of npy, sequences": (shards_of_sequences(False), None, FLAT | UNKNOWN),
    "folder of npy, sequences with masks": (shards_of_sequences(True), MASK, NO_IDS),
    "folder of safetensors with ids": (with_ids, None, FLAT),
    "pattern of pt": (
        lambda f, x: shards(lambda p, x: torch_save(np.array(x), p), ".pt")(f, x) / "*.pt", None, UNKNOWN),
    "save_to_disk float16": (
        lambda f, x: arrow_folder(f / "a", {"acts": pyarrow.array(
            [list(s) for s in x.astype(np.float16)], nested(pyarrow.float16()))}), HALVES, FLAT | UNKNOWN),
    "save_to_disk float64": (
        lambda f, x: arrow_folder(f / "a", {"acts": pyarrow.array(x.tolist(), nested(pyarrow.float64()))}), None,
        FLAT | UNKNOWN),
    "save_to_disk, one shard": (lambda f, x: arrow_folder(f / "a", ragged(x), (12,)), MASK, REAL),
    "DatasetDict, split and column": (
        lambda f, x: f"{dictionary(f, x)}/acts", MASK, REAL),
    "parquet, large lists": (
        lambda f, x: parquet(f / "x.parquet", {"v": pyarrow.array(x.tolist(), nested(pyarrow.float32(), True))}), None,
        FLAT | UNKNOWN),
    "parquet float64": (lambda f, x: parquet(f / "x.parquet", {"v": x.astype(np.float64).tolist()}), None,
                        FLAT | UNKNOWN),
    "parquet, padded": (
        lambda f, x: parquet(f / "x.parquet", {"v": pyarrow.array(x.tolist(), FLOATS), "ids": IDS.tolist(),
                                               "attention_mask": MASK.astype(int).tolist()}), MASK, REAL),
    "dataset of ours": (ours("float32"), MASK, REAL),
    "dataset of ours, bfloat16": (ours("bfloat16", "npy 3-D bfloat16"), HALF, FLAT | UNKNOWN),
    "dataset of ours from parquet": (ours("float32", "parquet"), MASK, REAL),
}  # fmt: skip


def expected(name, x):
    """The rows that a container holds, (tokens, d_model) float32, worked out from the array that it was made of."""
    which = TABLE[name][1]
    if isinstance(which, np.ndarray):
        return x[which]
    if which == STILL:
        return np.where(np.arange(D) == 2, np.float32(3), rows(x))
    return rows(x) if which is None else rows(x).astype(HALF if which == HALF else HALVES).astype(np.float32)


# -- the three verbs -------------------------------------------------------------------------------------------------


FEATURES, K, BATCH = 64, 4, 8


def counted(W, x):
    """Deaths and FVE of an untrained SAE without biases, whose decoder is its encoder, in float64."""
    x = np.asarray(x, np.float64)
    z = np.maximum(x @ np.asarray(W, np.float64).T, 0)
    kept = np.where(z >= np.sort(z, axis=1)[:, [-K]], z, 0)
    error = ((x - kept @ np.asarray(W, np.float64)) ** 2).sum()
    return {
        "dead_by_relu": np.mean(~(z > 0).any(axis=0)), "dead_total": np.mean(~(kept > 0).any(axis=0)),
        "fve": 1 - error / ((x - x.mean(axis=0)) ** 2).sum(),
    }


def gammas(x):
    """The three of a report."""
    x = np.asarray(x, np.float64)
    centred = x - x.mean(axis=1, keepdims=True)
    views = (centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5), x,
             x / np.linalg.norm(x, axis=1, keepdims=True))
    return dict(zip(("gamma", "gamma_raw", "gamma_direction"), (
        np.linalg.norm(v.mean(axis=0)) / np.linalg.norm(v.std(axis=0)) for v in views
    ), strict=True))  # fmt: skip


def untrained(seed):
    """The rows that every run of this seed starts from."""
    return np.asarray(sae_lib.init(jax.random.key(seed), FEATURES, K, jnp.zeros(D)).W_enc)


def extracted(path, folder, wanted, known):
    """Rows of the dataset that `extract` makes, and where they come from."""
    data: Any = files.open_chunks(store.import_file(path, str(folder)))
    read = [data.example(number) for number in range(len(data))]
    wrong = [] if np.array_equal(np.concatenate([part.x for part in read]), wanted) else ["rows"]
    return wrong + [
        key for key, values in known.items()
        if not np.array_equal(np.concatenate([getattr(part, key) for part in read]), values)
    ]


def differing(pairs):
    """Names of numbers that are not equal to 1e-6."""
    return [name for name, (a, b) in pairs.items() if not np.isclose(a, b, rtol=1e-6, atol=1e-9)]


def diagnosed(path, wanted):
    """Of `diagnose --measure`."""
    found = sae_jax.diagnose(path, n_features=FEATURES, k=K, measure=True, seed=0)
    deaths, measured = counted(untrained(1), wanted), found["remedies"]["none"]["measured"]
    still = np.flatnonzero((wanted == wanted[0]).all(axis=0)).tolist()
    return differing({
        **{key: (found[key], value) for key, value in gammas(wanted).items()},
        "n_tokens": (found["n_tokens"], len(wanted)), "d_model": (found["d_model"], D),
        **{key: (measured[key], deaths[key]) for key in ("dead_by_relu", "dead_total")},
    }) + ([] if found["constant_dimensions"] == still else ["constant dimensions"])  # fmt: skip


def trained(path, folder, wanted):
    """Of `train`, on what it trains on and what it holds out."""
    config = base({
        "data.path": path, "sae.n_features": FEATURES, "sae.k": K, "train.steps": 2, "train.batch_size": BATCH,
        "train.devices": 1, "eval.n_tokens": 40, "eval.batch_size": 40,
    })  # fmt: skip
    found = sae_jax.train(config, str(folder))
    held_out = wanted[split_chunks(len(wanted), min(40, len(wanted) // 5))[1]]
    rest = wanted[split_chunks(len(wanted), len(held_out))[0]]
    scale = np.sqrt(D) / np.linalg.norm(rest.astype(np.float64).std(axis=0))
    first, numbers = found["members"][0]["init"], counted(untrained(0), held_out * scale)
    return differing({
        "gamma_raw": (found["gamma_raw"], gammas(rest)["gamma_raw"]), "scale": (found["scale"], scale),
        "n_eval_tokens": (found["n_eval_tokens"], len(held_out)), "d_model": (found["d_model"], D),
        **{key: (first[key], numbers[key]) for key in ("dead_by_relu", "dead_total")},
    }) + ([] if np.isclose(first["fve"], numbers["fve"], rtol=1e-4) else ["fve"])  # fmt: skip


def row(name, folder, verbs=("extract", "diagnose", "train")):
    """A line of the table: `equal`, or what differs, under every verb."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    x = np.random.default_rng(0).normal(size=(N, T, D)).astype(np.float32) + 1
    path, wanted, known = str(TABLE[name][0](folder, x)), expected(name, x), TABLE[name][2]
    ways = {
        "extract": lambda: extracted(path, folder / "extracted", wanted, known),
        "diagnose": lambda: diagnosed(path, wanted),
        "train": lambda: trained(path, folder / "run", wanted),
    }
    done = {verb: ", ".join(ways[verb]()) or "equal" for verb in verbs}
    shutil.rmtree(folder)
    return {"container": name, "tokens": len(wanted), **done}


def main(workdir):
    """Every container through every verb."""
    run_lib.Run._draw = lambda *_: None
    logging.set_verbosity(logging.FATAL)
    root = workdir.absolute()
    found = []
    for name in TABLE:
        if ONLY.value in name:
            found.append(row(name, root / "made"))
            print(", ".join(map(str, found[-1].values())), flush=True)
    with (root / "containers.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, found[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    wrong = [line["container"] for line in found if set(list(line.values())[2:]) != {"equal"}]
    print(f"{len(found)} containers, {len(wrong)} with a number that differs: {', '.join(wrong)}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    command.run(main, "runs/containers")
