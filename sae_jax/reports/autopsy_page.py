"""An autopsy on one page: report.html, complete in itself, with a table of all features that sorts and filters.

The table's numbers lie in the page as JSON, column by column; a script of its own shows the rows that are in sight.
"""

import json
import re
from html import escape
from typing import Any

import numpy as np
from etils import epath

from sae_jax.reports import feature_table, page
from sae_jax.reports.page import Picture
from sae_jax.reports.tables import cell, explained_giants, title
from sae_jax.runtime.disk import write_bytes, write_text

SECTIONS = {
    "How often features fire": {
        "density": "Features by the share of tokens on which they fire; those that fire on none stand to the left.",
        "dead_over_tokens": "What has not fired yet counts as dead. Grey: as many tokens again are expected to "
        "wake at most as many features as fired once, if tokens are independent.",
    },
    "The mechanism": {
        "shifts": "Each feature's mean pre-activation over its standard deviation, as the SAE is and with its bias "
        "moved to the mean, on one axis: far left of zero a feature never fires, in the middle it never wins. The "
        "0.5 % furthest out are in the outermost bins.",
        "alignment": "Features that point against the mean lie to the left: what the encoder sees of the mean, they "
        "see as a constant below zero.",
    },
    "Activations": {
        "landscape": "Tokens over dimensions, after LayerNorm: dimensions that stand out on every token are what the "
        "mean is made of."
    },
}
TABLE_AFTER = "The mechanism"


def write(
    workdir: str, report: dict[str, Any], pictures: dict[str, Picture], columns: dict[str, np.ndarray],
    texts: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """report.html, and the wide pictures by themselves.

    Args:
      workdir: of the autopsy.
      report: as in report.json.
      pictures: by the names in SECTIONS.
      columns: name → value of each feature, as in features.csv.
      texts: the best tokens of each feature in their context, as `feature_table` has them.
    """
    folder = epath.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        write_bytes(folder / f"{name}.png", picture.wide)
    write_text(folder / "report.html", render(report, pictures, columns, texts))


def render(
    report: dict[str, Any], pictures: dict[str, Picture], columns: dict[str, np.ndarray],
    texts: dict[str, Any] | None = None,
) -> str:  # fmt: skip
    """The page."""
    kind = report["architecture"] + (f", k = {report['k']}" if report["k"] else "")
    size = f"n = {report['n_features']:,d}, d_model = {report['d_model']}"
    gammas = f"gamma {report['gamma']:.2f} (without LayerNorm {report['gamma_raw']:.2f})"
    lead, *rest = _set(report["advice"]).split(". ")
    name = "an SAE" if report["sae"] == "sae" else report["sae"]
    data = str(report["data"].get("path") or report["data"].get("id") or "array")
    body = [
        f"<h1>Feature death in {escape(name)}</h1>",
        f'<p class="soft">{escape(kind)}; {size}; {gammas}; {report["n_tokens"]:,d} tokens'
        f"{'' if data == 'array' else ' of ' + escape(data)}</p>",
        f'<p class="lead">{escape(lead.rstrip("."))}.</p><p>{escape(". ".join(rest))}</p>',
        *(f'<p class="beware">Beware: {escape(warning)}</p>' for warning in report["warnings"]),
        f'<div class="cards">{"".join(_cards(report))}</div>',
        f'<p class="soft">Dead: fired on none of {report["n_tokens"]:,d} tokens; a feature that fires on 1 in '
        f"{1 / report['highest_rate_of_dead']:,.0f} or fewer may look the same (95 %). "
        '<b class="key relu"></b>By ReLU where the pre-activation is never above 0, <b class="key topk"></b>by '
        f'{report["pathway"]} where it is, but never selected. <b class="key alive"></b>Alive.</p>',
        "<h2>As it is, and with its bias at the mean</h2>",
        _compared(report),
        f'<p class="soft">FVE: share of the variance{" of the target" if report["target"] else ""} explained, about '
        "the mean; a feature that fires again is worth what it explains. L0: features a token.</p>",
    ]
    for heading, those in SECTIONS.items():
        body += [f"<h2>{heading}</h2>", *(page.figure(pictures[name], caption) for name, caption in those.items())]
        if heading == TABLE_AFTER:
            body += ["<h2>Every feature</h2>", feature_table.render(columns, texts, report["pathway"])]
    missing = [[str(one["dimension"]), *(_set(f"{one[key]:.4g}") for key in ("mean", "bias", "share_of_missing"))]
               for one in report["bias_missing"]]  # fmt: skip
    facts = [[key, str(value)] for key, value in {**report["data"], **report["versions"]}.items()]
    known = [[key, json.dumps(value)[:200]] for key, value in report["sae_metadata"].items()]
    body += [
        "<h2>Details</h2>",
        "<details><summary>What the bias lacks of the mean</summary>"
        f"{page.table(['dimension', 'mean', 'bias', 'share of what is missing'], missing, 'plain')}</details>",
        *([f"<details><summary>The SAE's own metadata</summary>{page.table(['key', 'value'], known, 'settings')}"
           "</details>"] if known else []),
        f"<details><summary>Data and versions</summary>{page.table(['what', ''], facts, 'settings')}</details>",
        f"<footer><p>Seed {report['seed']}, {report['n_probes']} probes. Definitions: Simon, Adams and Zou, "
        "arXiv:2605.31518. The numbers are in report.json and features.csv beside this page.</p></footer>",
    ]  # fmt: skip
    return page.document(f"Feature death in {name}", body, feature_table.STYLE)


def _set(text: str) -> str:
    """As printed: minus signs, and numbers that are not parted from their per cent."""
    return re.sub(r"(?<![\w.])-(?=\d)", "−", text).replace(" %", "\u00a0%")


def _cards(report: dict[str, Any]) -> list[str]:
    def by(found: dict[str, Any]) -> str:
        relu, other = (cell("dead", found[key]) for key in ("dead_by_relu", "dead_by_topk"))
        return f"{relu} by ReLU, {other} by {report['pathway']}. "

    moved = report["if_centred"]
    n_dead = sum(map(len, report["dead_features"].values()))
    revived = f"{moved['revived']} of {n_dead} dead features fire. " if n_dead else ""
    fve, then = (_set(cell("fve", found["fve"])) for found in (report, moved))
    worth = f"FVE\u00a0{fve}\u00a0→\u00a0{then}"
    start = report["at_init"]
    untrained = start["none"]
    untrained = untrained | {"dead_by_topk": untrained["dead_total"] - untrained["dead_by_relu"]}
    return [
        page.card("As it is", report, f"{by(report)}FVE\u00a0{fve}"),
        page.card("Bias moved to the mean", moved, revived + worth),
        page.card(
            "Untrained, forecast", untrained,
            f"{cell('dead', start['mean']['dead_total'])} with its bias at the mean. TopK of this size.",
        ),
    ]  # fmt: skip


def _compared(report: dict[str, Any]) -> str:
    shown = ["dead_by_relu", "dead_by_topk", "dead_total", "fve"]
    shown += [*(["fve_without_giants"] if explained_giants(report) else []), "l0"]
    rows = [
        [name, *(_set(cell(key, found[key])) for key in shown)]
        for name, found in (("as it is", report), ("bias moved to the mean", report["if_centred"]))
    ]
    return page.table(["SAE", *(title(key, report["pathway"]) for key in shown)], rows, "results two")
