"""What a run leaves for people and programs: report.json, tables, and one line of how it stands."""

import csv
import importlib.metadata
import io
import json
import math
import platform
from typing import Any

import jax
from etils import epath

from sae_jax.outliers.giants import GIANT
from sae_jax.outliers.selections import NAMES
from sae_jax.runtime.disk import write_text

COLUMNS = {
    "dead_by_relu": "dead by ReLU", "dead_by_topk": "dead by TopK", "dead_total": "dead in total",
    "fve": "FVE", "fve_without_giants": "FVE without giants", "l0": "L0",
    "bias_projection": "b·mu/‖mu‖²", "mmcs": "MMCS",
}  # fmt: skip


def title(key: str, pathway: str = "TopK") -> str:
    """How a column of a report is headed; `pathway` is by what features die that are positive somewhere."""
    return f"dead by {pathway}" if key == "dead_by_topk" else COLUMNS.get(key, key)


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    packages = ("sae-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain", "ml_collections",
                "torch", "transformers")  # fmt: skip
    found = {name: importlib.metadata.version(name) for name in packages if _installed(name)}
    return {"python": platform.python_version(), "backend": jax.default_backend(), **found}


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def write_json(workdir: str, report: dict[str, Any]) -> None:
    """report.json; numbers that are not finite become null."""
    write_text(epath.Path(workdir) / "report.json", json.dumps(finite(report), indent=2, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """The same with None for every number that is not finite, which JSON has no way to write."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_csv(path: epath.PathLike, rows: list[dict[str, Any]]) -> None:
    """A table of rows that have the same keys, with its folder."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def one_line(row: dict[str, Any]) -> str:
    """A row of a table to be seen while the next one is made."""
    return "  ".join(f"{key} {value if isinstance(value, str) else format(value, '.3f')}" for key, value in row.items())


def table(report: dict[str, Any]) -> str:
    """The report of a training run as a short table: two lines a member, before training and after."""
    finals = [member["final"] for member in report["members"]]
    n_giants = finals[0].get("n_giant_tokens", 0)
    shown = [key for key in COLUMNS if any(key in final for final in finals)
             and (n_giants or key != "fve_without_giants")]  # fmt: skip
    lines = [["member", "step", *(title(key, report["pathway"]) for key in shown)]]
    for member in report["members"]:
        for when, step in (("init", 0), ("final", report["step"])):
            lines.append([member["name"], str(step), *(cell(key, member[when].get(key)) for key in shown)])
    kept = f", k = {report['k']}" if report["k"] else ""
    size = f"n = {report['n_features']}{kept}, {report['n_eval_tokens']} held-out tokens"
    size += f", {n_giants} of them giants ({GIANT:.0f} times the median norm)" if n_giants else ""
    return f"{size}; {_gammas(report)}\n{_aligned(lines)}\n{_dead_means(report)}"


def standing(members: dict[str, dict[str, float | None]]) -> str:
    """Loss, FVE and share of dead features on one line, member by member; of more than three their ranges."""
    if len(members) <= 3:
        return "; ".join(
            f"{name} loss {found['loss']:.4g}, FVE {cell('fve', found['fve'])}, dead {cell('dead', found['dead'])}"
            for name, found in members.items()
        )
    parts = [f"{len(members)} members"]
    for key, title in (("loss", "loss"), ("fve", "FVE"), ("dead", "dead")):
        known = [value for found in members.values() if (value := found[key]) is not None]
        ends = [f"{end(known):.4g}" if key == "loss" else cell(key, end(known)) for end in (min, max) if known]
        parts.append(f"{title} {' to '.join(dict.fromkeys(ends)) or cell(key, None)}")
    return ", ".join(parts)


def diagnosis_table(report: dict[str, Any]) -> str:
    """The report of a diagnosis: severity, what each law says, what each remedy would leave, the advice."""
    standing = [f"{o['dimension']} ({100 * o['share_of_mean_square']:.0f} % of ‖mu‖²)"
                for o in report["outlier_dimensions"][:4]]  # fmt: skip
    head = [
        f"{report['n_tokens']} tokens of {report['d_model']} dimensions; {_gammas(report)}",
        f"effective rank {report['effective_rank']:.0f}, excess kurtosis {report['kurtosis']['median']:.1f} (median), "
        f"{report['n_outlier_dimensions']} outlier dimensions" + (": " + ", ".join(standing) if standing else ""),
        *([f"{report['n_zero_tokens']} tokens are zero in every dimension: padding, perhaps"] if
          report["n_zero_tokens"] else []),
        *_giants(report),
        *(f"beware: {warning}" for warning in report["warnings"]),
        f"a bias that starts at 0 has 90 % of mu after {report['bias_learning_time'] / 3e-4:,.0f} steps of Adam at "
        "3e-4 (data scaled to ‖sigma‖ = √d), at the earliest",
        f"\ndead at initialisation, {_selected(report)}",
    ]
    other = report["selection"] != "topk"
    first, *rest = [title(key, "selection") for key in ("dead_by_relu", *(["dead_by_topk"] * other), "dead_total")]
    laws = [["law", first, *rest]]
    laws += [[name.replace("_", " "), *_deaths(found, other)] for name, found in report["predicted"].items()]
    remedies = [["remedy", f"forecast: {first}", *rest]]
    remedies += [[_remedy(name, found, report["d_model"]), *_deaths(found["probe"], other)]
                 for name, found in report["remedies"].items()]  # fmt: skip
    if all(found["measured"] for found in report["remedies"].values()):
        measured = [_deaths(found["measured"], other) for found in report["remedies"].values()]
        titles = [f"measured: {first}", *rest]
        remedies = [line + more for line, more in zip(remedies, [titles, *measured], strict=True)]
    parts = [*head, _aligned(laws), "", _aligned(remedies), _dead_means(report), ""]
    if report["after_training"]:
        parts += [_after_training(report["after_training"]), ""]
    parts.append(report["advice"])
    if report["recipe"]:
        settings = " ".join(f"--config.{key}={value}" for key, value in report["recipe"].items())
        parts.append(f"recipe to keep features alive in training, with --config=configs/single.py: {settings}")
    return "\n".join(parts)


def _after_training(found: dict[str, Any]) -> str:
    shown = ("dead_by_relu", "dead_by_topk", "dead_total")
    lines = [["member", *(COLUMNS[key] for key in shown), "pilots: low, high"]]
    for name, one in found["members"].items():
        pair = ", ".join(cell("dead_total", share) for share in one["pilots"])
        lines.append([name, *(cell(key, one[key]) for key in shown), pair])
    head = f"after {found['of']:,} steps of training, by pilots of {found['steps']:,}, on {found['n_tokens']:,} tokens"
    return f"{head}\n{_aligned(lines)}"


def autopsy_table(report: dict[str, Any]) -> str:
    """The report of an autopsy: the SAE as it is beside the same with its bias at the mean, and the verdict."""
    without = ["fve_without_giants"] if explained_giants(report) else []
    shown = ["dead_by_relu", "dead_by_topk", "dead_total", "fve", *without, "l0"]
    lines = [["SAE", *(title(key, report["pathway"]) for key in shown)]]
    for name, found in (("as it is", report), ("bias moved to the mean", report["if_centred"])):
        lines.append([name, *(cell(key, found[key]) for key in shown)])
    fates = [["features", "number", "median cosine with mu"]]
    for name, found in report["alignment_with_mean"].items():
        cosine = found["cosine"][1] if found["cosine"] else None
        fates.append([title(name, report["pathway"]), str(found["n"]), cell("cosine", cosine)])
    kind = report["architecture"] + (f", k = {report['k']}" if report["k"] else "")
    size = f"{kind}, n = {report['n_features']}, {report['n_tokens']} tokens"
    beware = [f"beware: {warning}" for warning in report["warnings"]]
    head = [f"{size}; {_gammas(report)}", *_giants(report), *_target(report), *beware]
    return "\n".join([*head, _aligned(lines), _dead_means(report), "", _aligned(fates), "", report["advice"]])


def explained_giants(report: dict[str, Any]) -> int:
    """How many giants are among the tokens that an autopsy's FVE is of."""
    found: int = (report["target"] or report)["n_giant_tokens"]
    return found


def _target(report: dict[str, Any]) -> list[str]:
    if not report["target"]:
        return []
    giants = f", {explained_giants(report)} of them giants" if explained_giants(report) else ""
    return [f"FVE is of the target, {report['target']['d_out']} dimensions of as many tokens{giants}"]


def _gammas(report: dict[str, Any]) -> str:
    return ", ".join(f"{key} {report[key]:.2f}" for key in ("gamma", "gamma_raw", "gamma_direction"))


def _dead_means(report: dict[str, Any]) -> str:
    """What a count of deaths on so many tokens says."""
    rate = 1 / report["highest_rate_of_dead"]
    said = f"dead: fired on none of these tokens; one that fires on 1 in {rate:,.0f} or fewer may look the same (95 %)"
    if "fired_once" in report:
        once = round(report["fired_once"] * report["n_features"])
        said += f"\nas many tokens again, if independent, are expected to wake at most the {once} that fired once"
    return said


def _giants(report: dict[str, Any]) -> list[str]:
    if not report["n_giant_tokens"]:
        return []
    found = f"{report['n_giant_tokens']} tokens have more than {GIANT:.0f} times the median norm"
    return [f"{found}; without them: {_gammas(report['without_giants'])}"]


def _remedy(name: str, found: dict[str, Any], d_model: int) -> str:
    kept = found["dimensions"]
    return name.replace("_", " ") + (f" ({kept} of {d_model} dimensions)" if kept < d_model else "")


def _selected(report: dict[str, Any]) -> str:
    """Of a diagnosis: the SAE in question."""
    named = {"n": report["n_features"], "k": report["k"], "threshold": report["threshold"]}
    size = ", ".join(f"{name} = {value}" for name, value in named.items() if value is not None)
    return size if report["selection"] == "topk" else f"{NAMES[report['selection']]}, {size}"


def _deaths(found: dict[str, float | None], between: bool) -> list[str]:
    """By ReLU and in total; what lies `between` is dead by selection."""
    relu, total = found["dead_by_relu"], found["dead_total"]
    by_selection = None if relu is None or total is None else total - relu
    return [cell("dead", share) for share in (relu, *([by_selection] * between), total)]


def _aligned(lines: list[list[str]]) -> str:
    """Columns of equal width, the first to the left and the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) if i else cell.ljust(width)
                  for i, (cell, width) in enumerate(zip(line, widths, strict=True))) for line in lines
    )  # fmt: skip


def cell(key: str, value: float | None) -> str:
    """A number as tables show it, by its key in the report."""
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" if key.startswith("dead") else f"{value:.3f}" if key != "l0" else f"{value:.1f}"
