"""Extraction, on random-weight models of the classes that the hub serves, saved and loaded; nothing is downloaded.

Every layer is held against a forward hook of the test's own, one sequence or image at a time, without padding.
"""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from sae_jax.activations import files, store
from sae_jax.config import base, check
from sae_jax.errors import Refused
from sae_jax.models import adapters, extraction, facts, hooks
from sae_jax.runtime import memory

torch = pytest.importorskip("torch", reason="needs the extra hf")
transformers = pytest.importorskip("transformers", reason="needs the extra hf")
from tokenizers import Regex, Tokenizer, pre_tokenizers, processors  # noqa: E402
from tokenizers.models import WordLevel  # noqa: E402

WIDTH, DEPTH = 16, 3
PROTEINS = ["MKTAYIAKQR", "GSHM", "MKVLAAGIVGLLLAQPSNEQ", "MA", "ACDEFGHIK"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def tokenizer(special, ends=None):
    """Single characters; `special` first in the vocabulary; `ends` (before, after) put around a text."""
    characters = [chr(i) for i in range(32, 127)]
    vocabulary = {word: i for i, word in enumerate([*special, *(c for c in characters if c not in special)])}
    found = Tokenizer(WordLevel(vocabulary, unk_token=special[0]))
    # What the test says is special is one token; all else is split into characters.
    found.pre_tokenizer = pre_tokenizers.Split(Regex(r"<[^>]{1,5}>|."), "isolated")
    if ends:
        found.post_processor = processors.TemplateProcessing(
            single=f"{ends[0]} $A {ends[1]}".strip(), special_tokens=[(e, vocabulary[e]) for e in ends if e]
        )
    return found


def fast(special, ends=None, **roles):
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(special, ends), unk_token=special[0], pad_token=special[0], **roles
    )


def gemma3():
    config = transformers.Gemma3TextConfig(
        vocab_size=130, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=DEPTH, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=0,
    )  # fmt: skip
    return transformers.Gemma3TextModel(config), fast(["<pad>", "<bos>"], ("<bos>", ""), bos_token="<bos>"), "layers"


def gpt2():
    config = transformers.GPT2Config(vocab_size=130, n_embd=WIDTH, n_layer=DEPTH, n_head=2, n_positions=64)
    return transformers.GPT2Model(config), fast(["<pad>", "<bos>"], bos_token="<bos>"), "h"


def pythia():
    config = transformers.GPTNeoXConfig(
        vocab_size=130, hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=2, intermediate_size=32
    )
    return transformers.GPTNeoXModel(config), fast(["<pad>", "<bos>"], bos_token="<bos>"), "layers"


def modernbert():
    config = transformers.ModernBertConfig(
        vocab_size=130, hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=2, intermediate_size=32,
        pad_token_id=0, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2, local_attention=8,
    )  # fmt: skip
    roles = {"cls_token": "<cls>", "sep_token": "<sep>"}
    words = fast(["<pad>", "<cls>", "<sep>"], ("<cls>", "<sep>"), **roles)
    return transformers.ModernBertModel(config), words, "layers"


TEXT = {"gpt2": gpt2, "pythia_70m": pythia, "modernbert": modernbert, "tiny/gemma3": gemma3}


@pytest.fixture(params=["torch", "jax"])
def backend(request):
    """What runs the model: the same is expected of both."""
    return request.param if request.param == "torch" else pytest.importorskip("torchax") and "jax"


@pytest.fixture
def settings(tmp_path):
    model = base().data.model
    model.layer, model.n_tokens, model.context, model.batch_size = 2, 345, 12, 4
    model.text, model.cache = str(tmp_path / "text.txt"), str(tmp_path / "cache")
    (tmp_path / "text.txt").write_text("what the model reads, character by character; " * 20)
    return model


def saved(monkeypatch, settings, folder, name, network, words=None):
    """The network in a folder, and the settings that name it; by the table's name where it has one."""
    torch.manual_seed(0)
    network.save_pretrained(folder)
    if words is not None:
        words.save_pretrained(folder)
    settings.id = name if name in facts.MODELS else str(folder)
    if name in facts.MODELS:
        tiny = facts.MODELS[name]._replace(id=str(folder), blocks=DEPTH, width=WIDTH)
        monkeypatch.setitem(facts.MODELS, name, tiny)


def extracted(settings, layers):
    """Rows of each layer."""
    found = {layer: [] for layer in layers}
    for _, parts in extraction.rows(adapters.load(settings), settings, layers):
        for layer, part in parts.items():
            found[layer].append(part)
    return {layer: store.Rows(*map(np.concatenate, zip(*parts, strict=True))) for layer, parts in found.items()}


def hooked(network, path, given, stream=0):
    """What goes into the first of the blocks and what comes out of each, by hooks of the test's own."""
    found, blocks = {}, network.get_submodule(path)

    def before(module, args, kwargs):
        found[0] = args[0] if args and stream == 0 else kwargs["hidden_states"]

    def after(layer):
        def hook(module, args, output):
            found[layer] = output if isinstance(output, torch.Tensor) else output[stream]

        return hook

    handles = [blocks[0].register_forward_pre_hook(before, with_kwargs=True)]
    handles += [block.register_forward_hook(after(layer)) for layer, block in enumerate(blocks, 1)]
    with torch.no_grad():
        network.eval()(**given)
    for handle in handles:
        handle.remove()
    return {layer: x[0].numpy() for layer, x in found.items()}


@pytest.mark.parametrize("name", TEXT)
def test_text_models_give_every_layer_without_their_special_tokens(name, settings, monkeypatch, tmp_path, backend):
    settings.backend = backend
    network, words, path = TEXT[name]()
    saved(monkeypatch, settings, tmp_path / "model", name, network, words)
    rows = extracted(settings, range(DEPTH + 1))
    ends = {"gpt2": ([1], []), "pythia_70m": ([1], []), "modernbert": ([1], [2]), "tiny/gemma3": ([1], [])}[name]
    text = words(Path(settings.text).read_text() + "\n\n", add_special_tokens=False).input_ids
    room = 12 - len(ends[0]) - len(ends[1])
    pieces = [text[i : i + room] for i in range(0, len(text) - room + 1, room)]
    assert all(len(found.x) >= settings.n_tokens for found in rows.values())
    for i in range(0, len(rows[0].x) // room, 9):
        given = {"input_ids": torch.tensor([ends[0] + pieces[i] + ends[1]])}
        for layer, x in hooked(network, path, given).items():
            np.testing.assert_allclose(rows[layer].x[i * room : (i + 1) * room], x[1 : 1 + room], atol=2e-5)
    at = rows[1]
    sequence = 5
    first = sequence * room
    assert (at.sequence_id[first], at.position[first], at.token_id[first]) == (sequence, 1, pieces[sequence][0])
    assert not set(at.token_id.tolist()) & {*ends[0], *ends[1]}


def test_special_tokens_stay_where_asked(settings, monkeypatch, tmp_path):
    network, words, _ = gpt2()
    saved(monkeypatch, settings, tmp_path / "model", "gpt2", network, words)
    settings.keep_special_tokens = True
    found = extracted(settings, [1])[1]
    assert (found.token_id == 1).sum() == len(found.x) / 12


def proteins(settings, tmp_path, kind="proteins"):
    (tmp_path / "proteins.fasta").write_text("".join(f">{i}\n{s[:5]}\n{s[5:]}\n" for i, s in enumerate(PROTEINS)))
    settings[kind] = str(tmp_path / "proteins.fasta")
    settings.batch_size, settings.context = 3, 64


def check_sequences(settings, network, path, given, inner, unpad=False):
    """Batched, padded rows against each sequence alone. `given`: sequence → inputs; `inner`: rows that are residues."""
    rows = extracted(settings, range(1, DEPTH + 1))
    alone = [hooked(network, path, given(sequence)) for sequence in PROTEINS]
    for layer, found in rows.items():
        expected = np.concatenate([one[layer][inner] for one in alone])
        assert found.x.shape == (sum(map(len, PROTEINS)), WIDTH)
        np.testing.assert_allclose(found.x, expected, atol=2e-5)
    assert rows[1].sequence_id.tolist() == [i for i, s in enumerate(PROTEINS) for _ in s]


def test_esm2_gives_residues_only_and_padding_does_not_leak(settings, monkeypatch, tmp_path, backend):
    settings.backend = backend
    words = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokens = transformers.EsmTokenizer(str(tmp_path / "vocab.txt"))
    config = transformers.EsmConfig(
        vocab_size=33, hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=2, intermediate_size=32,
        pad_token_id=1, mask_token_id=32, position_embedding_type="rotary", token_dropout=True,
    )  # fmt: skip
    network = transformers.EsmModel(config, add_pooling_layer=False)
    saved(monkeypatch, settings, tmp_path / "model", "esm2_35m", network, tokens)
    proteins(settings, tmp_path)
    check_sequences(
        settings, network, "encoder.layer",
        lambda s: {"input_ids": torch.tensor([[0, *(words.index(c) for c in s), 2]])}, slice(1, -1),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["progen_base", "evo", "glm2"])
def test_stand_ins_for_code_of_the_hub(name, settings, monkeypatch, tmp_path, backend):
    settings.backend = backend
    folder = tmp_path / f"repository_{name}"
    folder.mkdir()
    code = Path(__file__).with_name("standins.py").read_text()
    (folder / "modeling.py").write_text(code)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import standins

    cls = {"progen_base": "ProGenForCausalLM", "evo": "StripedHyenaModelForCausalLM", "glm2": "gLM2Model"}[name]
    auto = "AutoModel" if name == "glm2" else "AutoModelForCausalLM"
    network = getattr(standins, cls)(standins.StandInConfig())
    words = {
        "progen_base": fast(["<|pad|>", "1", "2"]), "evo": None,
        "glm2": fast(["<pad>", "<cls>", "<eos>", "<+>"], ("<cls>", "<eos>"), cls_token="<cls>", eos_token="<eos>"),
    }[name]  # fmt: skip
    saved(monkeypatch, settings, folder, name, network, words)
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "modeling.StandInConfig", auto: f"modeling.{cls}"}}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "modules")])
    proteins(settings, tmp_path, "dna" if name == "evo" else "proteins")
    with pytest.raises(Refused, match=f"data.model.remote_code = '': {name}=COMMIT"):
        extraction.extract(settings, [1], settings.cache)
    settings.remote_code = f"{name}={COMMIT}"
    if (name, backend) == ("glm2", "jax"):  # what it computes hangs on how long its sequences are
        with pytest.raises(Refused, match="data.model.backend = 'jax': torch: JAX cannot run glm2"):
            extraction.extract(settings, [1], settings.cache)
        assert not Path(settings.cache).exists()
        return
    path, ids, inner = {
        "progen_base": ("transformer.h", lambda s: words("1" + s + "2").input_ids, slice(1, -1)),
        "evo": ("backbone.blocks", lambda s: [ord(c) for c in s], slice(None)),
        "glm2": ("encoder.layers", lambda s: words("<+>" + s).input_ids, slice(2, -1)),
    }[name]
    check_sequences(settings, network, path, lambda s: {"input_ids": torch.tensor([ids(s)])}, inner)


def dinov2():
    config = transformers.Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=2, mlp_ratio=2, image_size=56, patch_size=56
    )
    return transformers.Dinov2Model(config), "encoder.layer", 1


def dinov3():
    config = transformers.DINOv3ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=2, intermediate_size=32, image_size=56,
        patch_size=56, num_register_tokens=4,
    )  # fmt: skip
    network = transformers.DINOv3ViTModel(config)
    return network, next(n for n, m in network.named_modules() if isinstance(m, torch.nn.ModuleList)), 5


@pytest.mark.parametrize("name", ["dinov2", "dinov3"])
def test_vision_transformers_give_patches_without_class_and_registers(
    name, settings, monkeypatch, tmp_path, rng, backend
):
    settings.backend = backend
    from PIL import Image

    network, path, specials = {"dinov2": dinov2, "dinov3": dinov3}[name]()
    saved(monkeypatch, settings, tmp_path / "model", name, network)
    settings.images = str(tmp_path / "images")
    Path(settings.images).mkdir()
    pictures = []
    for i in range(5):
        pictures.append(rng.integers(0, 256, (224, 240 + i, 3), np.uint8))
        Image.fromarray(pictures[-1]).save(tmp_path / "images" / f"{i}.png")
    rows = extracted(settings, range(DEPTH + 1))
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    for i, picture in enumerate(pictures):
        left = (240 + i - 224) // 2
        pixels = (picture[:, left : left + 224] / 255 - mean) / deviation
        given = {"pixel_values": torch.tensor(pixels.transpose(2, 0, 1)[None], dtype=torch.float32)}
        for layer, x in hooked(network, path, given).items():
            assert x.shape == (specials + 16, WIDTH)
            mine = rows[layer].sequence_id == i
            np.testing.assert_allclose(rows[layer].x[mine], x[specials:], atol=2e-5 if backend == "torch" else 1e-4)
    assert rows[1].position.min() == specials
    assert len(rows[1].x) == 5 * 16


def test_the_diffusion_transformer_gives_its_image_stream(settings, monkeypatch, tmp_path, rng, backend):
    settings.backend = backend
    diffusers = pytest.importorskip("diffusers", reason="needs the extra models")
    from PIL import Image

    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 4), norm_num_groups=2, latent_channels=4, shift_factor=0.1, scaling_factor=1.5,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1,
    )  # fmt: skip
    network = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=DEPTH, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=WIDTH, pooled_projection_dim=10,
        pos_embed_max_size=8,
    )  # fmt: skip
    name = "stable-diffusion-3-5-large"
    vae.save_pretrained(tmp_path / "model" / "vae")
    network.save_pretrained(tmp_path / "model" / "transformer")
    tiny = facts.MODELS[name]._replace(id=str(tmp_path / "model"), blocks=DEPTH, width=WIDTH)
    monkeypatch.setitem(facts.MODELS, name, tiny)
    settings.id, settings.images = name, str(tmp_path / "images")
    Path(settings.images).mkdir()
    pictures = [rng.integers(0, 256, (16, 16, 3), np.uint8) for _ in range(3)]
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / "images" / f"{i}.png")
    rows = extracted(settings, range(DEPTH + 1))
    noise = np.random.default_rng(0).standard_normal((3, 4, 8, 8), np.float32)
    for i, picture in enumerate(pictures):
        pixels = torch.tensor(picture.transpose(2, 0, 1)[None] / 127.5 - 1, dtype=torch.float32)
        with torch.no_grad():
            latent = (vae.eval().encode(pixels).latent_dist.mean - 0.1) * 1.5
        given = {
            "hidden_states": (latent + torch.tensor(noise[i : i + 1])) / 2, "timestep": torch.tensor([500.0]),
            "encoder_hidden_states": torch.zeros(1, 333, 12), "pooled_projections": torch.zeros(1, 10),
        }  # fmt: skip
        for layer, x in hooked(network, "transformer_blocks", given, stream=1).items():
            assert x.shape == (16, WIDTH)
            np.testing.assert_allclose(rows[layer].x[rows[layer].sequence_id == i], x, atol=2e-5)


def test_esm3_gives_residues_only_and_padding_does_not_leak(settings, tmp_path, monkeypatch):
    esm3 = pytest.importorskip("esm.models.esm3", reason="needs the extra esm3, in an environment of its own")
    from esm.tokenization import EsmSequenceTokenizer

    torch.manual_seed(0)
    network = esm3.ESM3(WIDTH, 2, 2, DEPTH, None, None, None, SimpleNamespace(sequence=EsmSequenceTokenizer())).eval()
    monkeypatch.setattr(adapters, "load", lambda model: adapters.esm3_network(network, model))
    proteins(settings, tmp_path)
    words = network.tokenizers.sequence
    check_sequences(
        settings, network, "transformer.blocks",
        lambda s: {"sequence_tokens": torch.tensor([words(s)["input_ids"]])}, slice(1, -1),
    )  # fmt: skip


@pytest.mark.parametrize(("hook", "path"), [("attention", "attn"), ("mlp", "mlp"), ("mlp.c_fc", "mlp.c_fc")])
def test_other_hook_points_are_modules_of_the_block(hook, path, settings, monkeypatch, tmp_path, backend):
    settings.backend = backend
    network, words, _ = gpt2()
    saved(monkeypatch, settings, tmp_path / "model", "gpt2", network, words)
    settings.hook = hook
    found, ids = {}, torch.randint(3, 60, (2, 7))
    network.eval().h[1].get_submodule(path).register_forward_hook(
        lambda m, a, out: found.setdefault(2, out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        network(ids)
    mine = hooks.streams(adapters.load(settings), {"input_ids": ids}, [2], hook)[2]
    np.testing.assert_allclose(mine, found[2], atol=1e-6)
    folder = extraction.extract(settings, [2], settings.cache)[2]
    assert files.open_chunks(folder).d_model == found[2].shape[-1]
    settings.hook = "no_such_module"
    with pytest.raises(Refused, match="data.model.hook = 'no_such_module': residual, attention, mlp or .*: ln_1, attn"):
        extraction.extract(settings, [2], settings.cache)


def test_in_bert_and_its_like_the_residual_stream_is_not_part_of_what_attention_and_mlp_give():
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    layer = transformers.BertModel(config, add_pooling_layer=False).encoder.layer[0]
    assert hooks._submodule(layer, "attention") is layer.attention.output.dense
    assert hooks._submodule(layer, "mlp") is layer.output.dense


def test_nothing_behind_the_last_layer_is_computed(settings, monkeypatch, tmp_path):
    network, words, _ = gpt2()
    saved(monkeypatch, settings, tmp_path / "model", "gpt2", network, words)
    loaded = adapters.load(settings)
    loaded.blocks[2].register_forward_hook(lambda *_: pytest.fail("ran on"))
    found = hooks.streams(loaded, {"input_ids": torch.randint(3, 60, (2, 7))}, [2, 1, 0])
    assert {layer: x.shape for layer, x in found.items()} == dict.fromkeys([2, 1, 0], (2, 7, WIDTH))


def test_rows_may_begin_later_and_are_the_same(settings, monkeypatch, tmp_path):
    network, words, _ = gpt2()
    saved(monkeypatch, settings, tmp_path / "model", "gpt2", network, words)
    loaded = adapters.load(settings)
    whole = list(extraction.rows(loaded, settings, [1, 2]))
    later = list(extraction.rows(loaded, settings, [1, 2], start=300))
    assert 0 < len(later) < len(whole)
    assert later[0][0] <= 300
    for (first, parts), (first_later, parts_later) in zip(whole[-len(later) :], later, strict=True):
        assert first == first_later
        for layer in (1, 2):
            for a, b in zip(parts[layer], parts_later[layer], strict=True):
                np.testing.assert_array_equal(a, b)


def test_layers_are_extracted_once_and_found_one_by_one(settings, monkeypatch, tmp_path):
    network, words, _ = gpt2()
    saved(monkeypatch, settings, tmp_path / "model", "gpt2", network, words)
    folders = extraction.extract(settings, [0, 1, 2], settings.cache)
    monkeypatch.setattr(adapters, "load", lambda *_, **__: pytest.fail("loaded again"))
    for layer in range(3):
        settings.layer = layer
        assert extraction.extracted(settings) == folders[layer]
        chunks = files.open_chunks(folders[layer])
        assert (chunks.identity["layer"], chunks.d_model) == (layer, WIDTH)
        assert len(chunks) * chunks.rows >= settings.n_tokens
    settings.layer = 3
    with pytest.raises(pytest.fail.Exception):
        extraction.extracted(settings)


def test_what_cannot_be_had_is_refused_before_anything_is_written(settings, monkeypatch, tmp_path):
    def refused(match, **changes):
        model = settings.copy_and_resolve_references()
        model.update(changes)
        with pytest.raises(Refused, match=match):
            extraction.extract(model, [model.layer], settings.cache)

    refused("data.model.id = 'gpt-9': OWNER/NAME on the hub, or one of gpt2, pythia_70m", id="gpt-9")
    refused("data.model.layer = 13: 0 to 12 for gpt2", id="gpt2", layer=13)
    refused("data.model.layer = 0: 1 to 12 for gpt2", id="gpt2", layer=0, hook="mlp")
    refused("data.model.id = .*: weights that can be loaded", id=str(tmp_path / "no-such-model"))
    refused("accept the terms at https://huggingface.co/facebook/dinov3-vit7b16.* HF_TOKEN", id="dinov3")
    refused("data.model.activations = '': a file of its single representation", id="af3", layer=0)
    refused("40 hexadecimal digits", id="evo", remote_code="evo=main")
    refused("data.model.text = .*: text that can be read", id="gpt2", text=str(tmp_path / "none.txt"))
    assert not Path(settings.cache).exists()


def test_user_supplied_activations_are_taken_as_they_are(settings, tmp_path, rng):
    np.save(tmp_path / "single.npy", rng.normal(size=(300, 384)).astype(np.float32))
    settings.id, settings.layer, settings.activations = "af3", 0, str(tmp_path / "single.npy")
    assert files.open_chunks(extraction.extracted(settings)).d_model == 384


def test_jax_without_torchax_names_its_extra_and_writes_nothing(settings, monkeypatch, tmp_path):
    network, words, _ = gpt2()
    saved(monkeypatch, settings, tmp_path / "model", "gpt2", network, words)
    monkeypatch.setitem(sys.modules, "torchax", None)
    settings.backend = "jax"
    with pytest.raises(Refused, match=r"sae-jax\[torchax\]"):
        extraction.extract(settings, [1], settings.cache)
    assert not Path(settings.cache).exists()


def test_positions_that_a_model_does_not_have_and_texts_too_short_are_refused(settings, monkeypatch, tmp_path, backend):
    network, words, _ = gpt2()
    saved(monkeypatch, settings, tmp_path / "model", "gpt2", network, words)
    settings.backend, settings.context = backend, 65
    with pytest.raises(Refused, match="data.model.context = 65: up to 64, the positions that gpt2 has"):
        extraction.extract(settings, [1], settings.cache)
    settings.context, settings.hook = 60, "mlp"
    Path(settings.text).write_text("short")
    with pytest.raises(Refused, match="data.model.id = 'gpt2': inputs that are long enough for one sequence"):
        extraction.extract(settings, [1], settings.cache)
    assert not Path(settings.cache).exists()


def test_datasets_of_torch_keep_the_name_that_they_had(settings):
    settings.id, settings.text = "gpt2", ""
    assert "backend" not in extraction.described(settings, 1)
    settings.backend = "jax"
    assert extraction.described(settings, 1)["backend"] == "jax"
    assert "weights" not in extraction.described(settings, 1)
    settings.weights = "bfloat16"
    assert extraction.described(settings, 1)["weights"] == "bfloat16"


@pytest.mark.parametrize("name", ["gpt2", "tiny/gemma3", "modernbert"])
def test_weights_in_bfloat16_are_rounded_and_no_more(name, settings, monkeypatch, tmp_path):
    """Against torch with parameters rounded alike: float32 in between, so bfloat16's own sums are the difference."""
    pytest.importorskip("torchax")
    network, words, _ = TEXT[name]()
    saved(monkeypatch, settings, tmp_path / "model", name, network, words)
    settings.n_tokens = 150
    exact = extracted(settings, [1, 2])
    settings.backend, settings.weights = "jax", "bfloat16"
    found = extracted(settings, [1, 2])
    for layer in (1, 2):
        x, y = exact[layer].x, found[layer].x
        assert y.dtype == np.float32
        error = np.linalg.norm(x - y) / np.linalg.norm(x - x.mean(axis=0))
        assert 1e-4 < error < 0.03, error


def test_weights_that_would_fill_a_device_are_spread_over_all(settings, monkeypatch, tmp_path):
    pytest.importorskip("torchax")
    network, words, _ = gpt2()
    saved(monkeypatch, settings, tmp_path / "model", "gpt2", network, words)
    settings.n_tokens, settings.backend = 150, "jax"
    exact, placed = extracted(settings, [1, 2]), []
    put = jax.device_put
    monkeypatch.setattr(memory, "available", lambda: 2**12)
    monkeypatch.setattr(jax, "device_put", lambda x, *a: placed.append(put(x, *a)) or placed[-1])
    found = extracted(settings, [1, 2])
    matrices = [x for x in placed if isinstance(x, jax.Array) and x.ndim == 2 and x.shape[1] == WIDTH]
    assert matrices
    assert all(len(x.sharding.device_set) == 2 and not x.is_fully_replicated for x in matrices)
    for layer in (1, 2):
        np.testing.assert_allclose(found[layer].x, exact[layer].x, atol=1e-5)


def test_bfloat16_weights_are_jaxs_alone(settings):
    config = base()
    config.data.model.weights = "bfloat16"
    config.data.model.id = "gpt2"
    with pytest.raises(Refused, match="data.model.weights = 'bfloat16': float32, or data.model.backend=jax"):
        check(config)


def test_sequences_of_many_lengths_are_few_programs(settings, monkeypatch, tmp_path):
    """1 to 40 tokens in batches of 3: padded to 16, 32 and 64, the last batch to 3 sequences."""
    pytest.importorskip("torchax")
    compiled = []
    lower = jax.stages.Lowered.compile
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self, *a: compiled.append(self) or lower(self, *a))
    config = transformers.EsmConfig(
        vocab_size=33, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        pad_token_id=1, mask_token_id=32, position_embedding_type="rotary",
    )  # fmt: skip
    words = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokens = transformers.EsmTokenizer(str(tmp_path / "vocab.txt"))
    saved(monkeypatch, settings, tmp_path / "model", "esm2_35m", transformers.EsmModel(config), tokens)
    lengths = [*range(1, 41, 3), 40]
    (tmp_path / "p.fasta").write_text("".join(f">{i}\n{'MKTAYIAKQR' * 4:.{n}}\n" for i, n in enumerate(lengths)))
    settings.proteins, settings.batch_size, settings.context = str(tmp_path / "p.fasta"), 3, 64
    settings.backend = "jax"
    found = extracted(settings, [1])[1]
    assert len(found.x) == sum(lengths)
    assert len(compiled) == 3


def test_a_missing_package_names_its_extra(monkeypatch, settings):
    monkeypatch.setattr(importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    settings.id = "gpt2"
    with pytest.raises(Refused, match=r"sae-jax\[hf\]"):
        adapters.load(settings)
