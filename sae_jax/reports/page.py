"""A run on one page: report.html, complete in itself (pictures inside, no script, nothing fetched).

What a page of anything is made of is here too: its look, cards, tables, figures.
"""

import base64
from html import escape
from typing import Any, NamedTuple

from etils import epath

from sae_jax.reports.tables import COLUMNS, cell, title
from sae_jax.runtime.disk import write_bytes, write_text

DRAWN = 12  # members that still fit into one picture; a larger ensemble has its first ones drawn


class Picture(NamedTuple):
    """A figure as two PNGs: for a page as wide as a desk, and for a phone."""

    wide: bytes
    narrow: bytes


# Sections of the page, each with its pictures and what they show; the first three also lie in the workdir as PNGs.
SECTIONS = {
    "Conditions compared": {"comparison": "Features dead at initialisation (pale) and at the end, by pathway."},
    "Death by pathway": {
        "deaths": "Features dead over steps. Death by selection, as by TopK, may recover in training; death by ReLU "
        "stays until the bias has learned the mean.",
        "shifts": "The mechanism. Each feature's mean pre-activation over its standard deviation: far left of zero it "
        "never fires, in the middle it never wins. On a share of the held-out tokens, so a few more look dead; "
        "the 0.5 % furthest out are in the outermost bins.",
    },
    "The bias and the mean": {
        "bias": "The share of the mean that the bias has learned, the distance left (what is below 0.0001 is drawn "
        "there), and death by ReLU against the share."
    },
    "Reconstruction": {
        "curves": "On the held-out tokens, at every checkpoint. FVE is cut off at −0.5: an untrained SAE that is not "
        "centred may start far below."
    },
    "Activations": {
        "landscape": "Tokens over dimensions, after LayerNorm: dimensions that stand out on every token are what the "
        "mean is made of."
    },
}
FILES = ("deaths", "bias", "shifts")

STYLE = """
:root { color-scheme: light; --ink: #1b1f24; --soft: #57606a; --line: #d8dee4; --relu: #b2182b; --topk: #ef8a62;
        --alive: #4393c3; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; color: var(--ink); background: #fff;
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
p { max-width: 46rem; margin: .5rem 0; }
.soft, figcaption, footer { color: var(--soft); font-size: .9rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); gap: .8rem;
         margin: 1.2rem 0; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; }
.card b { display: block; font-size: 1.7rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.bar { display: flex; height: 8px; border-radius: 4px; overflow: hidden; background: var(--alive);
       margin: .5rem 0 .3rem; }
.bar i { display: block; } .relu { background: var(--relu); } .topk { background: var(--topk); }
.alive { background: var(--alive); }
.key { display: inline-block; width: .7em; height: .7em; border-radius: 2px; margin-right: .3em; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--line); }
th { font-weight: 600; border-bottom-width: 2px; }
th:first-child, td:first-child { text-align: left; padding-left: 0; overflow-wrap: anywhere; }
.settings th, .settings td { text-align: left; overflow-wrap: anywhere; }
.settings td:first-child { width: 40%; }
figure { margin: 1rem 0; } figure img { display: block; height: auto; max-width: 100%; }
figcaption { max-width: 46rem; margin-top: .3rem; }
summary { cursor: pointer; font-weight: 600; } details { margin: .8rem 0; }
@media (max-width: 40rem) {
  body { font-size: 15px; }
  .settings td:first-child { width: 66%; }
  .results thead { display: none; }
  .results tr { display: grid; grid-template-columns: repeat(3, 1fr); gap: .3rem .6rem; padding: .6rem 0;
                border-bottom: 1px solid var(--line); }
  .results td { padding: 0; border: 0; text-align: left; }
  .results td::before { display: block; content: attr(data-label); color: var(--soft); font-size: .8rem; }
  .results td:first-child { grid-column: span 2; font-weight: 600; }
  .results td:first-child::before { content: none; }
  .results td:nth-child(2)::before { display: inline; content: "step "; }
}
"""


def write(workdir: str, report: dict[str, Any], pictures: dict[str, Picture]) -> None:
    """report.html, and the PNGs that are also there by themselves.

    Args:
      workdir: of a training run.
      report: as in report.json.
      pictures: by the names in SECTIONS.
    """
    folder = epath.Path(workdir)
    for name in FILES:
        write_bytes(folder / f"{name}.png", pictures[name].wide)
    write_text(folder / "report.html", render(report, pictures))


def render(report: dict[str, Any], pictures: dict[str, Picture]) -> str:
    """The page of a training run."""
    gammas = f"gamma {report['gamma']:.2f} (without LayerNorm {report['gamma_raw']:.2f})"
    kept = f", k = {report['k']}" if report["k"] else ""
    size = f"n = {report['n_features']}{kept}, d_model = {report['d_model']}"
    shown = [key for key in COLUMNS if any(key in member["init"] for member in report["members"])]
    rows = [
        [member["name"], str(step), *(cell(key, member[when][key]).replace("-", "−") for key in shown)]
        for member in report["members"] for when, step in (("init", 0), ("final", report["step"]))
    ]  # fmt: skip
    body = [
        "<h1>Feature death in a run of sae_jax</h1>",
        f'<p class="soft">{escape(_source(report["data"]))}; {gammas}; {size}; {report["step"]:,d} steps</p>',
        f'<div class="cards">{"".join(_card(member, report["pathway"]) for member in report["members"])}</div>',
        f'<p class="soft">Dead: never kept with a value above 0 on {report["n_eval_tokens"]:,d} held-out tokens; '
        '<b class="key relu"></b>by ReLU where the pre-activation is never above 0, <b class="key topk"></b>by '
        f'{report["pathway"]} where it is, but is never selected. <b class="key alive"></b>Alive.</p>',
        "<h2>Before and after training</h2>",
        table(["member", "step", *(title(key, report["pathway"]) for key in shown)], rows, "results"),
        '<p class="soft">FVE is about the mean. b·mu/‖mu‖² is the share of the mean that the bias has learned.</p>',
    ]
    if len(report["members"]) > DRAWN:
        body.append(f'<p class="soft">Of the {len(report["members"])} members the first {DRAWN} are drawn.</p>')
    for heading, those in SECTIONS.items():
        body += [f"<h2>{escape(heading)}</h2>", *(figure(pictures[name], caption) for name, caption in those.items())]
    settings = [[key, str(value)] for key, value in report["config"].items()]
    on = f"{report['devices']} device" + ("s" if report["devices"] > 1 else "")
    facts = [[key, str(value)] for key, value in {**report["data"], **report["versions"]}.items()]
    body += [
        "<h2>Settings</h2>",
        f"<details><summary>Configuration</summary>{table(['key', 'value'], settings, 'settings')}</details>",
        f"<details><summary>Data and versions</summary>{table(['what', ''], facts, 'settings')}</details>",
        f"<footer><p>Data scaled by {report['scale']:.6g}; seed {report['seed']}; {on}. "
        "Definitions: Simon, Adams and Zou, arXiv:2605.31518. The numbers are in report.json beside this page.</p>"
        "</footer>",
    ]
    return document(f"Feature death, {_source(report['data'])}", body)


def document(title: str, body: list[str], style: str = "") -> str:
    """A page of its own, from its parts."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>"
        f'<link rel="icon" href="data:,"><style>{STYLE}{style}</style></head>\n'
        "<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _source(data: dict[str, Any]) -> str:
    if data.get("id"):
        return f"{data['id']}, layer {data['layer']}"
    return str(data.get("path") or f"synthetic activations ({data.get('signal')})")


def _card(member: dict[str, Any], pathway: str) -> str:
    final = member["final"]
    relu, topk, fve = (cell(key, final[key]) for key in ("dead_by_relu", "dead_by_topk", "fve"))
    start = cell("dead_total", member["init"]["dead_total"])
    return card(member["name"], final, f"{relu} by ReLU, {topk} by {pathway}; {start} at the start. FVE\u00a0{fve}")


def card(name: str, found: dict[str, Any], said: str) -> str:
    """The dead share of an SAE as a number and a bar, with a few words below."""
    bar = "".join(
        f'<i class="{of}" style="width:{100 * found[key]:.2f}%"></i>'
        for of, key in (("relu", "dead_by_relu"), ("topk", "dead_by_topk"))
    )
    return (
        f'<div class="card">{escape(name)}<b>{cell("dead_total", found["dead_total"])} dead</b>'
        f'<div class="bar">{bar}</div><span class="soft">{escape(said)}</span></div>'
    )


def table(head: list[str], rows: list[list[str]], kind: str = "") -> str:
    """A table of text; `kind` is its class."""
    def line(row: list[str]) -> str:
        cells = (f'<td data-label="{escape(name)}">{escape(text)}</td>' for name, text in zip(head, row, strict=True))
        return f"<tr>{''.join(cells)}</tr>"

    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    inside = f"<thead><tr>{top}</tr></thead><tbody>{''.join(map(line, rows))}</tbody>"
    return f'<table class="{kind}">{inside}</table>'


def figure(picture: Picture, caption: str) -> str:
    """A picture, for a desk and for a phone, and what it shows."""
    wide, narrow = (f"data:image/png;base64,{base64.b64encode(png).decode()}" for png in picture)
    return (
        f'<figure><picture><source media="(max-width: 40rem)" srcset="{narrow}">'
        f'<img alt="{escape(caption)}" src="{wide}"></picture><figcaption>{escape(caption)}</figcaption></figure>'
    )
