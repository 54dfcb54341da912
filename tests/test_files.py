import io
import json
import zipfile

import jax.numpy as jnp
import numpy as np
import pyarrow
import pytest
from safetensors.flax import save_file

from sae_jax.activations import files, store, stored
from sae_jax.errors import Refused


@pytest.fixture
def x(rng):
    return rng.normal(size=(700, 5)).astype(np.float32)


def whole(path):
    chunks = files.open_chunks(str(path))
    assert chunks.d_model == 5
    return chunks.tokens(0, chunks.n_tokens)


def test_every_format_gives_the_same_rows(tmp_path, x):
    np.save(tmp_path / "a.npy", x)
    np.save(tmp_path / "fortran.npy", np.asfortranarray(x))
    np.savez(tmp_path / "plain.npz", x)
    np.savez(tmp_path / "named.npz", token_id=np.arange(700), acts=np.asfortranarray(x))
    np.savez_compressed(tmp_path / "small.npz", acts=x)
    save_file({"acts": jnp.asarray(x), "token_id": jnp.arange(700)}, tmp_path / "a.safetensors")
    for path in sorted(tmp_path.iterdir()):
        np.testing.assert_array_equal(whole(path), x, err_msg=str(path))


HOOK = "blocks.2.hook_resid_post"


def cache(folder, x, context=7, parts=(60, 40), ids=None):
    """As SAELens's CacheActivationsRunner leaves it (its version 6.54.12 and datasets 5.2 gave the schema)."""
    folder.mkdir()
    extension = {
        "ARROW:extension:name": "datasets.features.features.Array2DExtensionType",
        "ARROW:extension:metadata": f'[[{context}, {x.shape[1]}], "float32"]',
    }
    kind = pyarrow.list_(pyarrow.list_(pyarrow.float32()))
    schema = pyarrow.schema([
        pyarrow.field(HOOK, kind, metadata=extension),
        pyarrow.field("token_ids", pyarrow.list_(pyarrow.int32(), context)),
    ])
    start, names = 0, []
    for number, count in enumerate(parts):
        names.append({"filename": f"data-{number:05d}-of-{len(parts):05d}.arrow"})
        rows = slice(start * context, (start + count) * context)
        table = [x[rows].reshape(count, context, -1).tolist(), np.reshape(ids[rows], (count, context)).tolist()]
        columns = [pyarrow.array(values, field.type) for values, field in zip(table, schema, strict=True)]
        with pyarrow.ipc.new_stream(folder / names[-1]["filename"], schema) as writer:
            writer.write_table(pyarrow.table(columns, schema), max_chunksize=25)
        start += count
    (folder / "state.json").write_text(json.dumps({"_data_files": names, "_fingerprint": "00"}))
    return folder


def test_what_saelens_cached_is_read_and_imported_with_its_tokens(tmp_path, x):
    ids = np.arange(700) * 3 % 101
    folder = cache(tmp_path / "cache", x, ids=ids)
    np.testing.assert_array_equal(whole(folder), x)
    chunks = files.open_chunks(str(folder))
    for start, stop in ((0, 10), (170, 180), (400, 450), (699, 700)):
        np.testing.assert_array_equal(chunks.tokens(start, stop), x[start:stop])
    dataset = stored.StoredChunks(store.import_file(str(folder), str(tmp_path / "data")))
    rows = [dataset.example(i) for i in range(len(dataset))]
    np.testing.assert_array_equal(np.concatenate([row.x for row in rows]), x)
    np.testing.assert_array_equal(np.concatenate([row.token_id for row in rows]), ids)
    np.testing.assert_array_equal(np.concatenate([row.sequence_id for row in rows]), np.arange(700) // 7)
    np.testing.assert_array_equal(np.concatenate([row.position for row in rows]), np.arange(700) % 7)
    assert dataset.identity["imported"]["hook"] == HOOK


@pytest.mark.parametrize("damage", ["truncated", "missing", "state", "empty"])
def test_a_damaged_cache_is_refused(tmp_path, x, damage):
    folder = cache(tmp_path / "cache", x, ids=np.zeros(700, int))
    path = folder / "data-00001-of-00002.arrow"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-700])
    elif damage == "missing":
        path.unlink()
    else:
        (folder / "state.json").write_text("{}" if damage == "state" else '{"_data_files": []}')
    with pytest.raises(Refused, match="cache"):
        files.open_chunks(str(folder))


@pytest.mark.parametrize("name", ["../outside.arrow", "/etc/hostname", "inner/../../outside.arrow"])
def test_a_cache_cannot_name_files_outside_of_it(tmp_path, x, name):
    folder = cache(tmp_path / "cache", x, ids=np.zeros(700, int))
    (folder / "inner").mkdir()
    (folder / "data-00000-of-00002.arrow").rename(tmp_path / "outside.arrow")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(Refused, match=f"files beside state.json, not {name}"):
        files.open_chunks(str(folder))


def test_names_inside_an_archive_lead_nowhere(tmp_path, x, monkeypatch):
    """Members are read where they lie; none is unpacked, whatever it calls itself."""
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    with zipfile.ZipFile("a.npz", "w") as archive:
        packed = io.BytesIO()
        np.save(packed, x)
        archive.writestr("../../escaped.npy", packed.getvalue(), zipfile.ZIP_DEFLATED)
    np.testing.assert_array_equal(whole("a.npz"), x)
    store.import_file("a.npz", "data")
    assert {path.name for path in tmp_path.iterdir()} == {"in"}
    assert {path.name for path in (tmp_path / "in").iterdir()} == {"a.npz", "data"}


def test_half_precision_comes_as_it_is_or_as_float32(tmp_path, x):
    save_file({"acts": jnp.asarray(x, jnp.bfloat16)}, tmp_path / "b.safetensors")
    np.save(tmp_path / "h.npy", x.astype(np.float16))
    rounded = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)
    np.testing.assert_array_equal(whole(tmp_path / "b.safetensors"), rounded)
    np.testing.assert_array_equal(whole(tmp_path / "h.npy"), x.astype(np.float16))


@pytest.mark.parametrize("ending", ["npy", "npz", "safetensors"])
def test_a_truncated_file_is_refused(tmp_path, x, ending):
    path = tmp_path / f"x.{ending}"
    {"npy": lambda: np.save(path, x), "npz": lambda: np.savez(path, x),
     "safetensors": lambda: save_file({"a": jnp.asarray(x)}, path)}[ending]()  # fmt: skip
    for keep in (0, 5, 60, 3000):
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(Refused, match="data.path"):
            files.open_chunks(str(path))


@pytest.mark.parametrize("save", [np.save, np.savez])
def test_objects_are_refused_and_never_unpickled(tmp_path, save):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    path = tmp_path / ("x.npy" if save is np.save else "x.npz")
    save(path, np.array([[Trap(), 1.0]], dtype=object))
    with pytest.raises(Refused, match="objects"):
        files.open_chunks(str(path))


@pytest.mark.parametrize(("array", "said"), [
    (np.zeros(7), "tokens, d_model"), (np.zeros((2, 3, 4, 5)), "tokens, d_model"),
    (np.zeros((0, 4)), "tokens, d_model"),
    (np.zeros((8, 4), np.int64), "floating point"), (np.zeros((8, 4), np.complex64), "floating point"),
])  # fmt: skip
def test_what_is_not_activations_is_refused(tmp_path, array, said):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(Refused, match=said):
        files.open_chunks(str(tmp_path / "x.npy"))


def test_a_file_of_several_matrices_lists_them(tmp_path, x):
    np.savez(tmp_path / "x.npz", one=x, two=x)
    with pytest.raises(Refused, match=r"one \(700, 5\), two \(700, 5\)"):
        files.open_chunks(str(tmp_path / "x.npz"))
