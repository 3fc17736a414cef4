"""Writes the tables of docs/options.md from the files in conf/, comments included; run it after every change there."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
DOCUMENT = ROOT / "docs" / "options.md"
BEGIN, END = "<!-- options: written by scripts/options.py -->", "<!-- options: end -->"
NOT_OPTIONS = ("defaults", "hydra")


def main() -> None:
    """Put the tables between the two marks."""
    DOCUMENT.write_text(replaced(DOCUMENT.read_text()))


def replaced(text: str) -> str:
    """`text` with whatever stood between the marks replaced by the tables of today."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{DOCUMENT.name} lacks the marks {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{tables()}\n{END}{after}"


def tables() -> str:
    """All three tables as Markdown."""
    parts = [
        "## Groups\n",
        "Choose with `group=option`; where several are marked with `*` as the default, with `group=[one,another]`. "
        "The last column holds each option's settings, which take the group in front, `data.size=28`, and where "
        "several can be chosen the option too, `evaluator.latency.batch=8`. `???` must be given.\n",
        _table(("group", "option", "what it is", "settings"), _groups()),
        "\n## Knobs\n",
        "What the search may turn, per method. Change one with its path, such as "
        "`compressor.prune.space.sparsity.granularity=layer` or `compressor.distill.space.epochs.choices=[0,4]`. "
        "Runtime and rest precision are knobs too; their choices come from `runtime=[...]` and from the processor.\n",
        _table(("knob", "choices", "asked per", "remarks"), _knobs()),
        "\n## The rest\n",
        _table(("option", "default", "what it is"), _general()),
    ]
    return "\n".join(parts)


def _groups() -> Iterator[Sequence[str]]:
    chosen = _chosen()
    for group, names in chosen.items():
        others = sorted({path.stem for path in (CONF / group).glob("*.yaml")} - set(names))
        for path in (CONF / group / f"{name}.yaml" for name in [*names, *others]):
            link = f"[`{path.stem}`](../conf/{group}/{path.name})" + (" *" if path.stem in names else "")
            yield f"`{group}`", link, _summary(path), _settings(_load(path))


def _chosen() -> dict[str, list[str]]:
    """Group -> its default options, in the order of the defaults list; groups without any files stay out."""
    chosen: dict[str, list[str]] = {}
    for entry in _load(CONF / "config.yaml")["defaults"]:
        for group, options in entry.items() if isinstance(entry, dict) else ():
            if (CONF / group).is_dir():
                chosen[group] = options if isinstance(options, list) else [options] if options else []
    return chosen


def _summary(path: Path) -> str:
    """The comment that a file starts with, less its list of alternatives; without one, the class it makes."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.removeprefix("#").strip())
    text = re.sub(r"\s*(Alternatives?|Others?|Another)\b[^:]*:.*", "", " ".join(lines))
    return text or f"`{_load(path)['_target_']}`"


def _settings(node: Mapping[str, Any]) -> str:
    """Every leaf with its value, by its path; the search space has a table of its own."""
    shown = {key: value for key, value in node.items() if key not in ("space", "name")}
    return ", ".join(f"`{path}={_shown(value)}`" for path, value in _leaves(shown))


def _leaves(node: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{path}{key}.")
        elif not key.startswith("_"):
            yield path + key, value


def _knobs() -> Iterator[Sequence[str]]:
    for name in _chosen()["compressor"]:
        path = CONF / "compressor" / f"{name}.yaml"
        remarks = _remarks(path)
        for key, entry in _load(path)["space"].items():
            remark = "; ".join(remarks[at] for at in (f"space.{key}", f"space.{key}.choices") if at in remarks)
            if key == "when":
                yield f"all of `{name}`", "", "", f"only with {entry}: {remark}"
            else:
                yield f"`{name}.{key}`", _choices(entry), entry.get("granularity", "trial"), remark


def _choices(entry: Mapping[str, Any]) -> str:
    if "low" in entry:
        step = f", in steps of {entry['step']}" if "step" in entry else ""
        return f"{entry['low']} to {entry['high']}{step}"
    choices = entry["choices"]
    kinds = choices if isinstance(choices, dict) else {"": choices}
    return "; ".join(f"{kind}: {_listed(values)}".removeprefix(": ") for kind, values in kinds.items())


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))


def _general() -> Iterator[Sequence[str]]:
    path = CONF / "config.yaml"
    remarks = _remarks(path)
    for key, value in _load(path).items():
        if key in NOT_OPTIONS:
            continue
        for leaf, default in _leaves({key: value}):
            told = remarks.get(leaf) or remarks.get(key, "")
            yield f"`{leaf}`", f"`{_shown(default)}`", told


def _remarks(path: Path) -> dict[str, str]:
    """Dotted path -> the comment behind it on its line."""
    found: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for line in path.read_text().splitlines():
        match = re.match(r"( *)(\w+):(.*)", line)
        if not match:
            continue
        depth = len(match[1])
        above = [*((d, key) for d, key in above if d < depth), (depth, match[2])]
        _, mark, remark = match[3].partition(" # ")
        if mark:
            found[".".join(key for _, key in above)] = remark.strip()
    return found


def _load(path: Path) -> dict[str, Any]:
    """The file as it stands: what it takes from elsewhere stays a `${...}`."""
    loaded: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    return dict(loaded)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{_listed(value)}]"
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def _table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    """A bar inside a cell would end it."""
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
