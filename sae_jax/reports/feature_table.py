"""A table of all features inside a page: its numbers as JSON, and the script that sorts, filters and shows them.

Of tens of thousands of rows only those in sight are in the document.
"""

import json
from typing import Any, NamedTuple

import numpy as np

FATES = ("alive", "dead_by_topk", "dead_by_relu")


class Column(NamedTuple):
    """How a column is headed and shown, and what it means."""

    label: str
    kind: str  # fate | flag | feature | number
    meaning: str


COLUMNS = {
    "fate": Column("fate", "fate", "Alive, dead by ReLU, or positive and yet never selected, on these tokens."),
    "frequency": Column("frequency", "number", "Share of these tokens on which it fires."),
    "revived_if_centred": Column("revived if centred", "flag", "Dead, but fires with the bias moved to the mean."),
    "distance_to_threshold": Column(
        "distance to threshold", "number",
        "What it passes its bar by where it does best (the k-th largest of the token, its threshold, or 0); below 0 it "
        "never passed.",
    ),
    "largest_activation": Column("largest activation", "number", "Over these tokens."),
    "mean_preactivation": Column("mean pre-activation", "number", "Over these tokens."),
    "cosine_with_mean": Column("cosine with mean", "number", "Of its encoder row with the mean of the activations."),
    "decoder_norm": Column("decoder norm", "number", "Length of its decoder row."),
    "nearest_twin": Column("nearest twin", "feature", "The feature whose decoder row is most like its own."),
    "twin_cosine": Column("twin cosine", "number", "Cosine of the two decoder rows."),
    "tokens_since_fired": Column("tokens since fired", "number", "In training, up to the checkpoint."),
}  # fmt: skip


def render(columns: dict[str, np.ndarray], texts: dict[str, Any] | None = None, pathway: str = "TopK") -> str:
    """The table as a part of a page.

    Args:
      columns: name → value of each feature; those that COLUMNS names are shown, in its order.
      pathway: by what features die that are positive somewhere.
      texts: `vocabulary` (strings), `tokens` (of the first tokens, each its number in the vocabulary), `breaks` (rows
        where a sequence begins), `best` (rows of each feature's best tokens); None where they are not known.
    """
    shown = [name for name in COLUMNS if name in columns]
    data = {
        "columns": [[name, *COLUMNS[name]] for name in shown], "values": [_plain(columns[name]) for name in shown],
        "fates": FATES, "pathway": pathway, "texts": texts,
    }  # fmt: skip
    written = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=False).replace("</", "<\\/")
    frame = FRAME.replace("TOPK", pathway)
    return f'{frame}<script type="application/json" id="features">{written}</script><script>{SCRIPT}</script>'


def _plain(values: np.ndarray) -> list[Any]:
    """As JSON: fates as their numbers, flags as 0 and 1, six digits of a number, null where there is none."""
    if values.dtype.kind in "US":
        return [FATES.index(value) for value in values.tolist()]
    if values.dtype.kind in "bi":
        return [int(value) for value in values.tolist()]
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values.tolist()]


FRAME = """<div class="tools">
<label>Show <select id="fate"><option value="">all</option><option value="0">alive</option>
<option value="dead">dead</option><option value="1">dead by TOPK</option><option value="2">dead by ReLU</option>
<option value="revived">revived if centred</option><option value="left">dead even if centred</option></select></label>
<label class="find">Find <input id="find" type="search" autocomplete="off" spellcheck="false"
placeholder="17, or frequency &lt; 0.001, twin_cosine &gt; 0.9"></label><output id="count"></output></div>
<div class="view" id="view" tabindex="0"><table class="features"><colgroup></colgroup><thead></thead><tbody></tbody>
</table></div><noscript><p>The table needs a script; features.csv beside this page has the same numbers.</p></noscript>
<p class="soft">A heading sorts, once more turns the order round; a row opens below.</p><div id="one"></div>
"""

STYLE = """
.lead { font-size: 1.2rem; line-height: 1.4; } .beware { border-left: 3px solid var(--topk); padding-left: .7rem; }
.tools { display: flex; flex-wrap: wrap; gap: .6rem 1rem; align-items: center; margin: .6rem 0; }
.tools label { display: flex; gap: .4rem; align-items: center; } .find { flex: 1 1 16rem; }
.tools input { flex: 1; min-width: 0; } .tools input, .tools select { font: inherit; font-size: .9rem;
  padding: .25rem .5rem; border: 1px solid var(--line); border-radius: 6px; background: #fff; color: inherit; }
.tools input[aria-invalid=true] { border-color: var(--relu); outline-color: var(--relu); }
.view { height: 27rem; overflow: auto; border: 1px solid var(--line); border-radius: 8px;
  --wide: min(var(--columns, 100%), 100vw - 3rem); min-width: 100%; max-width: max(100%, var(--wide));
  width: var(--wide); margin-left: min(0px, (100% - var(--wide)) / 2); }
.features { table-layout: fixed; border-collapse: separate; border-spacing: 0; }
.features th { position: sticky; top: 0; background: #f6f8fa; z-index: 1; padding: 0; vertical-align: bottom;
  overflow-wrap: normal; }
.features th button { font: inherit; font-weight: 600; line-height: 1.2; color: inherit; background: none; border: 0;
  padding: .4rem .6rem; width: 100%; text-align: inherit; cursor: pointer; }
.features th[aria-sort=ascending] button::after { content: " ▲"; font-size: .7em; }
.features th[aria-sort=descending] button::after { content: " ▼"; font-size: .7em; }
.features td { height: 30px; padding: 0 .6rem; white-space: nowrap; overflow: hidden; box-sizing: border-box; }
.features th:first-child, .features td:first-child { position: sticky; left: 0; background: #f6f8fa;
  padding-left: .6rem; text-align: right; }
.features th:first-child { z-index: 2; padding: 0; } .features .left { text-align: left; }
.features tbody tr { cursor: pointer; } .features tbody tr:hover td { background: #eef4fb; }
.features tr.spacer td { height: 0; padding: 0; border: 0; }
.features tr.open td { background: #fff6e5; }
#one { margin: .6rem 0; } #one h3 { font-size: 1rem; margin: .8rem 0 .4rem; }
#one dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); gap: .4rem 1rem; margin: 0; }
#one dt { color: var(--soft); font-size: .8rem; } #one dd { margin: 0; font-variant-numeric: tabular-nums; }
#one ol { padding-left: 1.4rem; margin: .6rem 0; } #one li { overflow-wrap: anywhere; margin: .2rem 0; }
#one mark { background: #fde2b3; border-radius: 3px; padding: 0 .1em; }
.plain { width: auto; } .plain th:first-child { overflow-wrap: normal; }
@media (max-width: 40rem) { .results.two td:first-child { grid-column: 1 / -1; }
  .results.two td:nth-child(2)::before { display: block; content: attr(data-label); } .view { height: 24rem; } }
"""

SCRIPT = """
"use strict";
(() => {
const data = JSON.parse(document.getElementById("features").textContent), HEIGHT = 30, SPARE = 8;
const fateNames = ["alive", `dead by ${data.pathway}`, "dead by ReLU"], fateColours = ["alive", "topk", "relu"];
const n = data.values[0].length, numbers = Array.from({length: n}, (_, i) => i);
const columns = [["feature", "feature", "feature", "Its number."], ...data.columns]
  .map(([name, label, kind, meaning], i) => ({name, label, kind, meaning, values: i ? data.values[i - 1] : numbers}));
const byName = Object.fromEntries(columns.map(column => [column.name, column]));
const find = id => document.getElementById(id), view = find("view"), table = view.firstElementChild;
const [widths, head, rows] = table.children;
let shown = numbers, sorted = "feature", down = false, open = null;

function text(value, kind) {
  if (value === null || kind === "feature" && value < 0) return "–";
  if (kind === "flag") return value ? "yes" : "no";
  if (kind === "fate") return fateNames[value];
  if (kind === "feature" || Number.isInteger(value)) return String(value).replace("-", "−");
  const size = Math.abs(value);
  return (size < 1e-3 || size >= 1e6 ? value.toExponential(2) : String(Number(value.toPrecision(4))))
    .replaceAll("-", "−");
}

function make(tag, inside = "", attributes = {}) {
  const one = document.createElement(tag);
  one.textContent = inside;
  for (const [key, value] of Object.entries(attributes)) one.setAttribute(key, value);
  return one;
}

function conditions(given) {
  const wanted = given.trim();
  if (/^[\\d\\s,]*$/.test(wanted)) {
    const those = new Set((wanted.match(/\\d+/g) || []).map(Number));
    return those.size ? [i => those.has(i)] : [];
  }
  const pattern = /([a-z_]+)\\s*(<=|>=|<|>|=)\\s*([-−]?[\\d.]+(?:e[-+]?\\d+)?)/gi, found = [];
  const left = wanted.replace(pattern, (_, name, sign, bound) => {
    const column = byName[name.toLowerCase()], edge = Number(bound.replace("−", "-"));
    if (!column || Number.isNaN(edge)) return "?";
    const {values} = column;
    found.push({"<": i => values[i] < edge, ">": i => values[i] > edge, "=": i => values[i] === edge,
                "<=": i => values[i] <= edge, ">=": i => values[i] >= edge}[sign]);
    found.push(i => values[i] !== null);
    return "";
  });
  return /^(\\s|,|and)*$/i.test(left) ? found : null;
}

function choose() {
  const fate = find("fate").value, fates = byName.fate.values, revived = byName.revived_if_centred.values;
  const asked = conditions(find("find").value);
  find("find").setAttribute("aria-invalid", asked === null);
  const tests = asked || [];
  if (fate === "dead") tests.push(i => fates[i] > 0);
  else if (fate === "revived") tests.push(i => revived[i]);
  else if (fate === "left") tests.push(i => fates[i] > 0 && !revived[i]);
  else if (fate) tests.push(i => fates[i] === Number(fate));
  const {values} = byName[sorted], turn = down ? -1 : 1;
  shown = numbers.filter(i => tests.every(test => test(i))).sort((a, b) => {
    const x = values[a], y = values[b];
    if (x === y) return a - b;
    if (x === null || y === null) return x === null ? 1 : -1;
    return x < y ? -turn : turn;
  });
  find("count").textContent = asked === null ? "not understood: NAME < NUMBER, or numbers of features"
    : `${shown.length.toLocaleString("en")} of ${n.toLocaleString("en")} features`;
  for (const cell of head.rows[0].cells)
    cell.setAttribute("aria-sort", cell.dataset.name !== sorted ? "none" : down ? "descending" : "ascending");
  view.scrollTop = 0;
  draw();
}

function spacer(count) {
  const row = make("tr", "", {class: "spacer", style: `height: ${count * HEIGHT}px`});
  row.append(make("td", "", {colspan: columns.length}));
  return row;
}

function draw() {
  const first = Math.max(0, Math.floor(view.scrollTop / HEIGHT) - SPARE);
  const last = Math.min(shown.length, first + Math.ceil(view.clientHeight / HEIGHT) + 2 * SPARE);
  const drawn = shown.slice(first, last).map(i => {
    const row = make("tr", "", {"data-feature": i, ...(i === open ? {class: "open"} : {})});
    for (const {kind, values} of columns) {
      const cell = make("td", text(values[i], kind), kind === "fate" ? {class: "left"} : {});
      if (kind === "fate") cell.prepend(make("b", "", {class: `key ${fateColours[values[i]]}`}));
      row.append(cell);
    }
    return row;
  });
  rows.replaceChildren(spacer(first), ...drawn, spacer(shown.length - last));
}

function show(i) {
  open = i;
  const list = make("dl");
  for (const {kind, label, values, meaning} of columns.slice(1)) {
    const part = make("div", "", {title: meaning});
    part.append(make("dt", label), make("dd", text(values[i], kind)));
    list.append(part);
  }
  find("one").replaceChildren(make("h3", `Feature ${i}`), list, ...contexts(i));
  draw();
}

function contexts(i) {
  if (!data.texts) return [];
  const {vocabulary, tokens, breaks, best} = data.texts, begins = new Set(breaks), list = make("ol");
  const word = row => vocabulary[tokens[row]];
  for (const at of best[i]) {
    let from = at, to = at + 1;
    while (from > 0 && at - from < 12 && !begins.has(from)) from--;
    while (to < tokens.length && to - at < 6 && !begins.has(to)) to++;
    const item = make("li"), span = (a, b) => Array.from({length: b - a}, (_, j) => word(a + j)).join("");
    item.append(span(from, at), make("mark", word(at)), span(at + 1, to));
    list.append(item);
  }
  const said = byName.fate.values[i] === 0 ? "Where it fires most"
    : byName.revived_if_centred.values[i] ? "Where it fires most with the bias at the mean"
    : "Where it comes nearest to firing";
  return [make("h3", said), list];
}

const width = (kind, name) => kind === "fate" ? 8.5 : name === "feature" ? 5.2 : 6.7;
head.append(make("tr"));
for (const {name, label, kind, meaning} of columns) {
  widths.append(make("col", "", {style: `width: ${width(kind, name)}rem`}));
  const cell = make("th", "", {"data-name": name, title: `${meaning} (${name})`, scope: "col",
                               ...(kind === "fate" ? {class: "left"} : {})});
  const button = make("button", label, {type: "button"});
  button.addEventListener("click", () => {
    // What is large is looked for first, but for the numbers of features.
    [sorted, down] = [name, sorted === name ? !down : kind !== "feature" && kind !== "fate"];
    choose();
  });
  cell.append(button);
  head.rows[0].append(cell);
}
const whole = columns.reduce((sum, {kind, name}) => sum + width(kind, name), 0);
table.style.width = `${whole}rem`;
view.style.setProperty("--columns", `${whole + 1.2}rem`);
rows.addEventListener("click", event => {
  const row = event.target.closest("tr[data-feature]");
  if (row) show(Number(row.dataset.feature));
});
view.addEventListener("scroll", () => requestAnimationFrame(draw));
find("fate").addEventListener("change", choose);
find("find").addEventListener("input", choose);
choose();
})();
"""
