"""Concepts that single features detect, by InterPLM's protocol: AntiBERTy at its own gamma and at gamma 8.

    pip install -e ".[bundled]"
    python -m experiments.trust.concept_f1 --workdir=runs/concepts --scale=cpu

The residues of antibody variants (the built-in sequences) after block 4, annotated from the sequence alone: residue,
class, the residue before, replaced or not, N-glycosylation sequons, the disulfide pair, framework and CDRs by the
motifs that bound them, thirds, chain, antibody. SAEs as they are, centred, and centred and balanced, small ones and
some four times as large, are trained on the activations as they are and on x' = x − mu + g·mu, g such that gamma_raw
is 8; beside them an untrained one. Features are divided by their largest value on the training tokens, feature and
threshold picked on validation sequences, F1 counted on test sequences. A concept is found where that F1 is above 0.5.
Writes concept_f1.csv, a row for each concept and SAE. About ten minutes of processor time. `--longer` trains as long as
the race of experiments/death does, the large ones alone and at the mean that there is, on 100,000 residues, eight
initialisations of each: 40 minutes.
"""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from experiments import command
from experiments.command import said
from sae_jax import config as config_lib
from sae_jax.activations import store
from sae_jax.autoencoder import sae as sae_lib
from sae_jax.autoencoder.sae import SAE
from sae_jax.errors import Refused
from sae_jax.exchange import formats, sharing
from sae_jax.models import adapters, extraction, inputs
from sae_jax.reports import tables
from sae_jax.training import recovery
from sae_jax.training import run as run_lib

LAYER, HIGH, SEEDS, MORE_SEEDS = 4, 8.0, range(3), range(8)  # the latter with --longer
# training tokens, validation and test tokens each, n of the large SAE, k, steps, batch, learning rate
SCALES = {"smoke": (3000, 1500, 64, 4, 20, 64, 1e-3), "cpu": (32_000, 8_000, 1024, 8, 800, 256, 1e-3),
          "longer": (100_000, 8_000, 1024, 8, 5000, 256, 3e-4),
          "paper": (10_000_000, 500_000, 8192, 64, 50_000, 2048, 1e-3)}  # fmt: skip
LONGER = flags.DEFINE_bool("longer", False, "at --scale=cpu: as the race trains, n 1024 at the mean that there is")
KINDS = {"baseline": {"center": "none"}, "centred": {"center": "mean"}, "balanced": {"center": "mean", "balance": True}}
ARMS = {f"{name} {share}": {"sae": sae, "share": share} for name, sae in KINDS.items() for share in (1, 4)}
MIN_INSTANCES = 25  # of a concept, in the validation tokens and again in those of the test
CLASSES = {"aromatic": "FWY", "positive": "KRH", "negative": "DE", "small": "GAS", "hydrophobic": "AVILM",
           "polar": "STNQ"}  # fmt: skip
REGIONS = ("FR1", "CDR1", "FR2", "CDR2", "FR3", "CDR3", "FR4")
BOUNDS = {"heavy": r"(.+?CAAS)(.+?)(WVRQAPGKGLEWV)(.+?)(RFT.+?YYC)(.+?)(WGQG.+)",
          "light": r"(.+?TC)(.+?)(WYQQKPGKAPK[LV]LIY)(.{7})(GVPS.+?YYC)(.+?)(FGQG.+)"}  # fmt: skip


def regions(parent: str) -> tuple[str, list[tuple[int, int]]]:
    """(chain, first and one past the last residue of each of REGIONS) of an antibody domain."""
    for chain, pattern in BOUNDS.items():
        if found := re.fullmatch(pattern, parent):
            return chain, [found.span(i + 1) for i in range(len(REGIONS))]
    raise ValueError(f"no antibody domain: {parent}")


def concepts(sequence: str) -> dict[str, np.ndarray]:
    """Concept → (residues,): −1, or the number of the instance, that of its first residue."""
    parent = min((p for p in inputs.ANTIBODIES if len(p) == len(sequence)),
                 key=lambda p: sum(a != b for a, b in zip(p, sequence, strict=True)))  # fmt: skip
    letters, own, at = np.array(list(sequence)), np.array(list(parent)), np.arange(len(sequence))
    chain, spans = regions(parent)

    def single(mask: np.ndarray) -> np.ndarray:
        return np.where(mask, at, -1)

    def stretch(*parts: tuple[int, int]) -> np.ndarray:
        found = np.full(len(at), -1)
        for start, stop in parts:
            found[start:stop] = start
        return found

    found = {f"residue {a}": single(letters == a) for a in inputs.AMINO_ACIDS}
    found |= {f"behind {a}": single((np.roll(letters, 1) == a) & (at > 0)) for a in inputs.AMINO_ACIDS}
    found |= {name: single(np.isin(letters, list(members))) for name, members in CLASSES.items()}
    found["replaced"] = single(letters != own)
    found["sequon"] = stretch(*((m.start(), m.start() + 3) for m in re.finditer("N(?=[^P][ST])", sequence)))
    cysteines = [spans[0][1] - (4 if chain == "heavy" else 1), spans[4][1] - 1]
    found["disulfide"] = np.where(np.isin(at, cysteines) & (letters[cysteines] == "C").all(), cysteines[0], -1)
    third = len(at) / 3
    found |= {f"third {i + 1}": stretch((round(i * third), round((i + 1) * third))) for i in range(3)}
    for name in BOUNDS:
        mine = name == chain
        found[name] = stretch((0, len(at))) if mine else stretch()
        found |= {f"{name} {region}": stretch(span) if mine else stretch()
                  for region, span in zip(REGIONS, spans, strict=True)}  # fmt: skip
    found |= {f"antibody {i}": stretch((0, len(at))) if p == parent else stretch()
              for i, p in enumerate(inputs.ANTIBODIES)}  # fmt: skip
    return found


def residues(scale: str) -> store.Rows:
    """Activations of every residue, with its sequence and its place in it (0 is the token before the first)."""
    n_tokens = SCALES[scale][0] + 2 * SCALES[scale][1]
    if scale == "smoke":  # a random vector for every letter, and for the one before it
        rng, parts = np.random.default_rng(0), []
        table = rng.normal(size=(2, 128, 16)).astype(np.float32)
        for number, sequence in zip(range(n_tokens // 100), inputs.read("proteins", ""), strict=False):
            codes = np.frombuffer(sequence.encode(), np.uint8).astype(int)
            x = table[0, codes] + 0.5 * table[1, np.roll(codes, 1)]
            parts.append(store.Rows(x, codes, np.full(len(codes), number), 1 + np.arange(len(codes))))
    else:
        model = config_lib.base().data.model
        model.id, model.n_tokens = "antiberty", n_tokens
        parts = [rows[LAYER] for _, rows in extraction.rows(adapters.load(model), model, [LAYER])]
    return store.Rows(*map(np.concatenate, zip(*parts, strict=True)))


def annotated(rows: store.Rows) -> tuple[list[str], np.ndarray]:
    """(names, (tokens, concepts): −1 or the number of the instance, its own over all sequences)."""
    first, names, found = 0, [], []
    for number, sequence in zip(range(int(rows.sequence_id.max()) + 1), inputs.read("proteins", ""), strict=False):
        mine = concepts(sequence)
        names, table = list(mine), np.stack(list(mine.values()), axis=1)
        table = np.where(table >= 0, table + first, -1)
        found.append(table[rows.position[rows.sequence_id == number] - 1])
        first += len(sequence)
    return names, np.concatenate(found)


def codes(sae: SAE, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What an SAE keeps of each token, (N, k) twice."""
    run = jax.jit(lambda part: sae_lib.encode(sae, part))
    parts = [jax.device_get(run(jnp.asarray(part))) for part in np.array_split(x, -(-len(x) // 2000))]
    return tuple(np.concatenate(found) for found in zip(*parts, strict=True))  # type: ignore[return-value]


def score(sae: SAE, splits: dict[str, Any]) -> recovery.Concepts:
    """Detectors picked on validation, counted on test, of features in units of their largest value in training."""
    largest = np.zeros(sae.W_enc.shape[0])
    values, indices = codes(sae, splits["train"][0])
    np.maximum.at(largest, indices, values)
    validation, test = (
        recovery.concept_f1(*codes(sae, x), largest, instances)
        for x, instances in (splits["validation"], splits["test"])
    )
    return recovery.best_detectors(validation, test)


def arms_of(scale: str) -> dict[str, dict[str, Any]]:
    """Those that are trained."""
    return {name: arm for name, arm in ARMS.items() if scale != "longer" or arm["share"] == 1}


def seeds_of(scale: str) -> range:
    """Initialisations of each arm."""
    return MORE_SEEDS if scale == "longer" else SEEDS


def trained(workdir: Path, scale: str, gamma: float, x: np.ndarray) -> dict[str, Any]:
    """Trains all arms and seeds on the same batches; their report."""
    _, _, n, k, steps, batch, rate = SCALES[scale]
    workdir.mkdir(parents=True, exist_ok=True)
    np.save(workdir / "train.npy", x)
    c = config_lib.base()
    c.data.path = str(workdir / "train.npy")
    c.sae.k, c.auxk.preset, c.checkpoint.every = k, "none", steps
    c.train.update(steps=steps, batch_size=batch, learning_rate=rate)
    c.members = ConfigDict({f"{name} {seed}": {"seed": seed, "sae": {**arm["sae"], "n_features": n // arm["share"]}}
                            for name, arm in arms_of(scale).items() for seed in seeds_of(scale)})  # fmt: skip
    return run_lib.train(c, str(workdir / "run"))


def table(rows: list[dict[str, Any]]) -> str:
    """Concepts found (mean and range over seeds), mean F1, and what is dead."""
    lines = ["| gamma | SAE | n | found | range | mean F1 | dead by ReLU | dead | FVE |", "| --- |" + " --- |" * 8]
    for gamma, arm in dict.fromkeys((row["gamma"], row["arm"]) for row in rows):
        mine = [row for row in rows if (row["gamma"], row["arm"]) == (gamma, arm)]
        seeds = dict.fromkeys(row["seed"] for row in mine)
        found = [sum(row["test"] > 0.5 for row in mine if row["seed"] == seed) for seed in seeds]
        mean = {key: np.mean([row[key] for row in mine]) for key in ("test", "dead_by_relu", "dead_total", "fve")}
        of = len({row["concept"] for row in mine})
        lines.append(f"| {gamma} | {arm} | {mine[0]['n']} | {np.mean(found):.1f} of {of} | {min(found)}–{max(found)} | "
                     f"{mean['test']:.3f} | {100 * mean['dead_by_relu']:.1f} % | {100 * mean['dead_total']:.1f} % | "
                     f"{mean['fve']:.3f} |")  # fmt: skip
    return "\n".join(lines)


def main(workdir: Path, scale: str) -> None:
    """Extracts, annotates, trains at both gammas, counts."""
    if said(LONGER):
        if scale != "cpu":
            raise Refused("--scale", scale, "cpu, with --longer")
        scale = "longer"
    tokens = residues(scale)
    names, instances = annotated(tokens)
    n_train, n_other, *_ = SCALES[scale]
    # Whole sequences, so that no variant is in two parts.
    ends = [int(np.searchsorted(tokens.sequence_id, tokens.sequence_id[min(at, len(tokens.x) - 1)]))
            for at in (n_train, n_train + n_other)]  # fmt: skip
    parts = dict(zip(("train", "validation", "test"), np.split(np.arange(len(tokens.x)), ends), strict=True))
    enough = [all(len(np.unique(instances[parts[key], c])) > MIN_INSTANCES for key in ("validation", "test"))
              for c in range(len(names))]  # fmt: skip
    names, instances = [name for name, there in zip(names, enough, strict=True) if there], instances[:, enough]
    mu = tokens.x[parts["train"]].mean(axis=0, dtype=np.float64)
    own = float(np.linalg.norm(mu) / np.linalg.norm(tokens.x[parts["train"]].std(axis=0, dtype=np.float64)))
    rows = []
    for gamma in (own,) if scale == "longer" else (own, HIGH):
        x = (tokens.x + (gamma / own - 1) * mu).astype(np.float32)
        splits = {key: (x[part], instances[part]) for key, part in parts.items()}
        folder = workdir / f"gamma_{gamma:.2f}"
        result = {member["name"]: member for member in trained(folder, scale, gamma, splits["train"][0])["members"]}
        for name in [*arms_of(scale), "untrained 1"]:
            for seed in seeds_of(scale):
                if name in arms_of(scale):
                    packed = sharing.packed_of(str(folder / "run"), f"{name} {seed}")
                    sae, dead = jax.tree.map(jnp.asarray, formats.folded(packed)), result[f"{name} {seed}"]["final"]
                else:
                    center = jnp.asarray(x[parts["train"]].mean(axis=0))
                    sae = sae_lib.init(jax.random.key(seed), SCALES[scale][2], SCALES[scale][3], center)
                    dead = result[f"centred 1 {seed}"]["init"]
                found = score(sae, splits)
                rows += [{"gamma": round(gamma, 2), "arm": name[:-2], "n": sae.W_enc.shape[0], "seed": seed,
                          "concept": concept, "feature": int(feature), "threshold": float(threshold),
                          "validation": float(valid), "test": float(test),
                          **{key: dead[key] for key in ("dead_by_relu", "dead_total", "fve")}}
                         for concept, feature, threshold, valid, test in zip(names, *found, strict=True)]  # fmt: skip
    for row in rows:
        row["arm"] += f", n {row['n']}"
    tables.write_csv(workdir / "concept_f1.csv", rows)
    print(table(rows), flush=True)


if __name__ == "__main__":
    command.start(main, "concepts")
