"""Where an SAE's activations come from, in each library's own words, and what of it may leave this machine.

    SAELens               blocks.3.hook_resid_post     layer 3: TransformerLens' names, counted from 0
    dictionary_learning   resid_post_layer_3
    sparsify              layers.3

Metadata have the first; layer 3 here is `data.model.layer` 4, the stream after four blocks.
"""

import os
import re
from typing import Any

from ml_collections import ConfigDict

from sae_jax import config as config_lib
from sae_jax.errors import Refused
from sae_jax.models.inputs import HUB

# Site → its names in TransformerLens, dictionary_learning and sparsify (or the model itself).
SITES = {
    "resid_post": ("hook_resid_post", "resid_post", ""), "resid_pre": ("hook_resid_pre", "resid_pre", ""),
    "mlp": ("hook_mlp_out", "mlp_out", ".mlp"), "attention": ("hook_attn_out", "attention_out", ".self_attn"),
}  # fmt: skip
OURS = {"residual": "resid_post", "attention": "attention", "mlp": "mlp"}  # data.model.hook → site
NUMBER = re.compile(r"(?:^|[._])(?:blocks|layers|layer|h)[._](\d+)(?=$|[._])")
PLAIN = {"": "resid_post", "mlp": "mlp", "self_attn": "attention", "attn": "attention", "attention": "attention"}


def canonical(hook: str) -> str:
    """A hook point under its TransformerLens name; those of no known spelling stay as they are."""
    for lens, dictionary, _ in SITES.values():
        if found := re.fullmatch(rf"{dictionary}_layer_(\d+)", hook):
            return f"blocks.{found[1]}.{lens}"
    found = re.fullmatch(r"(?:[a-z_]+\.)*(?:layers|h)\.(\d+)(?:\.(\w+))?", hook)
    if found and (found[2] or "") in PLAIN:
        return f"blocks.{found[1]}.{SITES[PLAIN[found[2] or '']][0]}"
    return hook


def layer_of(hook: str) -> int | None:
    """The number of the block that a hook point names."""
    found = NUMBER.search(hook)
    return int(found[1]) if found else None


def spelled(hook: str | None, library: str) -> str | None:
    """A TransformerLens name as dictionary_learning or sparsify writes it; others stay as they are."""
    found = re.fullmatch(r"blocks\.(\d+)\.(\w+)", hook or "")
    for lens, dictionary, plain in SITES.values():
        if found and found[2] == lens:
            if library == "dictionary_learning":
                return f"{dictionary}_layer_{found[1]}"
            if lens != "hook_resid_pre":  # sparsify reads what a module returns
                return f"layers.{found[1]}{plain}"
    return hook


def of_run(config: ConfigDict, facts: dict[str, Any]) -> dict[str, Any]:
    """Which model and hook point a run's activations are of, under SAELens' names; nothing where unknown.

    Args:
      facts: what the run says of its data: those of a dataset where it was trained on one.
    """
    facts = facts | facts.get("imported", {})
    model = {**config.data.model.to_dict(), **facts} if config.data.model.id and not config.data.path else facts
    known: dict[str, Any] = {"context_size": model.get("context")}
    if not model.get("id"):
        hook = canonical(str(model.get("hook", "")))
        known |= {"hook_name": hook, "layer": layer_of(hook)} if layer_of(hook) is not None else {}
        return {key: value for key, value in known.items() if value is not None}
    after = int(model["layer"])
    block, hook = max(after - 1, 0), model.get("hook", "residual")
    site = SITES[OURS[hook]][0] if hook in OURS and after else "hook_resid_pre"
    named = f"blocks.{block}.{site}" if hook in OURS else canonical(f"layers.{block}.{hook}")
    text = (model.get("inputs") or {}).get("text") or model.get("text") or ""
    return known | {
        "model_name": model["id"], "hook_name": named, "layer": block,
        "prepend_bos": True,  # where the tokenizer has one
        "exclude_special_tokens": not model.get("keep_special_tokens", False),
        "dataset_path": text.removeprefix(HUB),
    }  # fmt: skip


def described(metadata: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
    """Metadata as they leave: with what the user `said` laid over, one spelling, and nothing of this machine.

    Raises:
      Refused: what was said cannot be, or contradicts itself.
    """
    said = {key: value for key, value in said.items() if value is not None}
    for key, least in (("layer", 0), ("context_size", 1)):
        if said.get(key, least) < least:
            raise Refused(f"--{key}", said[key], f"a number ≥ {least}")
    for key in ("model_name", "hook_name"):
        if said.get(key) == "":
            raise Refused(f"--{key}", "", "a name, or leave it out")
    found = public(metadata) | said
    hook = canonical(str(found.get("hook_name") or ""))
    if hook:
        found["hook_name"] = hook
    named = layer_of(hook)
    if named is not None:
        if said.get("layer", named) != named:
            raise Refused("--layer", said["layer"], f"{named}, which {hook} names, or another --hook_name")
        found["layer"] = named
    elif "hook_name" in said and "layer" not in said:  # what is known is of another hook point
        found.pop("layer", None)
    return found


# -- what stays here -------------------------------------------------------------------------------------------------


def public(value: Any) -> Any:
    """The same without names of files and folders of this machine."""
    if isinstance(value, dict):
        return {key: public(item) for key, item in value.items() if not is_local(key, item)}
    return [public(item) for item in value if not is_local("", item)] if isinstance(value, list) else value


def is_local(key: str, value: Any) -> bool:
    """Whether something is the name of a file or folder: by its key, its form, or because it is there."""
    if not isinstance(value, str) or not value or value.startswith(HUB):
        return False
    if key in config_lib.PATH_KEYS or "://" in value and not value.startswith(("https://", "http://")):
        return True
    if re.match(r"[/~\\]|\.{1,2}[/\\]|[A-Za-z]:[/\\]", value):
        return True
    return len(value) < 1024 and key.endswith(("path", "dir", "id", "model_name")) and os.path.exists(value)


SYNTHETIC = ("signal", "gamma", "d_model", "mean_direction", "n_true_features", "n_active", "rank", "tail_df")
OF_A_SIGNAL = {"sparse": ("rank", "tail_df"), "gaussian": ("n_true_features", "n_active")}  # those of the other one
CARRIED_OUT = (  # how a run went, which changes nothing in what it made
    "train.steps_per_dispatch", "train.mesh", "checkpoint.every", "eval.batch_size", "eval.points",
    "data.model.batch_size", "data.model.stream",
)  # fmt: skip


def applied(settings: dict[str, Any]) -> dict[str, Any]:
    """Those of a run's settings that something came of: of its own source of activations, none that is off.

    What stood for a default is the number that it stood for.
    """
    path, model = (settings.get(key, "of this machine") for key in ("data.path", "data.model.id"))
    source = "path" if path else "model" if model else "synthetic"
    left_out = {"path": ("data.model.",), "synthetic": ("data.model.",), "model": ()}[source]
    if source != "synthetic":
        left_out += tuple(f"data.{key}" for key in SYNTHETIC)
    left_out += tuple(f"data.{key}" for key in OF_A_SIGNAL.get(settings.get("data.signal", ""), ()))
    known = config_lib.flatten(config_lib.base())
    config = config_lib.from_identity({key: value for key, value in settings.items() if key in known})
    resolved = settings | {
        "auxk.weight": config_lib.auxk_weight(config), "auxk.dead_after_tokens": config_lib.dead_after_tokens(config)
    }  # fmt: skip
    if config.auxk.preset == "none":
        left_out += ("auxk.weight", "auxk.dead_after_tokens")
    return {key: value for key, value in resolved.items()
            if value not in ("", None) and value is not False and key not in CARRIED_OUT
            and not key.startswith(left_out)}  # fmt: skip
