"""Model cards: what is known of a weight file, as JSON and as text made from it; and which files ship."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apthory import backbones
from apthory._tools.files import write_atomically

MAX_CHECKPOINT_BYTES = 8_000_000  # bytes of all shipped files from before the end of training, together
_WEIGHT_KINDS = {"ema": "moving average", "model": "as trained"}
_ENDINGS = (".safetensors", ".json", ".md")


def write(card: Mapping[str, Any], weights: Path) -> None:
    """Write the card of a weight file beside it, as JSON and as Markdown."""
    write_atomically(weights.with_suffix(".json"), json.dumps(card, indent=2).encode() + b"\n")
    write_atomically(weights.with_suffix(".md"), text(card).encode())


def read_card(weights: Path) -> dict[str, Any]:
    """The card of a weight file.

    Raises:
        ValueError: If there is none.
    """
    path = weights.with_suffix(".json")
    if not path.is_file():
        raise ValueError(f"{weights.name} has no model card {path.name} beside it; export it with `apthory pretrain`")
    return json.loads(path.read_text("utf-8"))


def curve(card: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was recorded after each epoch of all runs that made the weights, epochs counted from the first run's."""
    points, done = [], 0
    for run in (*card.get("before", []), card):
        points += [{**point, "epoch": done + point["epoch"]} for point in run["curve"]]
        done += run.get("epoch", 0)
    return points


def num_epochs(card: Mapping[str, Any]) -> int:
    """Epochs of all runs that made the weights."""
    return card["epochs"] + sum(run["epoch"] for run in card.get("before", []))


def text(card: Mapping[str, Any]) -> str:
    """The card in Markdown."""
    file, test, data, recipe = card["file"], card["test"], card["data"], card["recipe"]
    earlier, epochs, hours = card.get("before", []), num_epochs(card), card["hours"]
    start, whole = "random weights", ""
    if earlier:
        start = f"the weights of an earlier run ({_length(earlier[-1])}, below)"
        whole = f" ({epochs} epochs and {hours + sum(run['hours'] for run in earlier):.1f} hours in all)"
    clock = f", {hours:.1f} hours of wall clock{whole}" if hours else ""
    losses = ""
    if card["curve"]:
        losses = "In the curve, `loss` is that of the training images as they were augmented, with softened labels"
        losses += "; `validation_*` are of training images held out." if data.get("validation") else "."
    kind = _WEIGHT_KINDS[file["weights"]]
    return f"""# {Path(file["name"]).stem}

`{file["name"]}`: {card["parameters"]:,} parameters ({kind}) in float16, running variances of batch
norms in float32, after {card["epochs"]} of {recipe["epochs"]} epochs from {start}{clock}.

**Top-1 {test["top1"]:.2%}** on the {test["images"]:,} test images of `{data["name"]}` ({data["classes"]} classes).
{losses}

{card["note"]}

```python
backbone = apthory.load_backbone("{card["backbone"]}", weights="{file["name"]}")
```

## Data
{_two_columns(data)}

## Recipe
{_two_columns(card["recipe"])}

## Hardware and versions
{_two_columns(card["environment"])}

## Curve
{_table(card["curve"]) or "Not recorded."}
""" + "".join(_earlier(run) for run in reversed(earlier))


def card_problems(weights: Path) -> list[str]:
    """Say how a weight file of ours and its card's JSON disagree; empty if they do not."""
    try:
        card = read_card(weights)
        if card["file"]["sha256"] != hashlib.sha256(weights.read_bytes()).hexdigest():
            return [f"{weights.name} is not the file of its card: the SHA-256 differs"]
        num_classes = card["data"]["classes"]
        model = backbones.load(card["backbone"], weights=weights, num_classes=num_classes, device="cpu")
    except ValueError as error:  # no card, or other shapes
        return [str(error)]
    _, _, checkpoint = weights.stem.partition(".")
    facts = {
        "name": (card["file"]["name"], weights.name),
        "number of parameters": (card["parameters"], sum(parameter.numel() for parameter in model.parameters())),
        "side of the images": (card["recipe"]["size"], backbones.input_size(model)),
        "epochs": (f"epoch-{card['epochs']:04d}", checkpoint or f"epoch-{card['recipe']['epochs']:04d}"),
    }
    return [
        f"{weights.name}: the {name} of its card, {said!r}, is not that of the file, {true!r}"
        for name, (said, true) in facts.items()
        if said != true
    ]


def ship(files: Sequence[Path], folder: Path | None = None) -> list[Path]:
    """Put exported weights into the package, each with its card, in place of all that it has of these backbones.

    Args:
        files: ``NAME.safetensors`` of each backbone, and of the epochs that ship beside it.
        folder: Instead of the package's own.

    Returns:
        The weight files written.

    Raises:
        ValueError: If a file and its card disagree, the card has no note on the licence, epochs are of another run or
            of a later one, or take too much room, or `backbones.load` would start from other random weights than the
            run did.
    """
    folder = folder or backbones.shipped_folder()
    cards = {path: _accepted(path) for path in map(Path, files)}
    for path, card in cards.items():
        last = next((other for other in cards if other.stem == card["backbone"]), None)
        if last is None:
            raise ValueError(f"{path.name} without {card['backbone']}.safetensors, the end of its run; give both")
        if path == last:
            continue
        first = _first_run(cards[last])
        expected = {"recipe": first["recipe"], "data": cards[last]["data"]}
        if differing := [part for part, value in expected.items() if card[part] != value]:
            raise ValueError(f"{path.name} and {last.name} are of two runs: they differ in {' and '.join(differing)}")
        if card.get("before"):
            raise ValueError(f"{path.name} did not begin with random weights; ship epochs of the first run alone")
        ended = first.get("epoch", cards[last]["epochs"])
        if card["epochs"] > ended:
            raise ValueError(f"{path.name} is not on the way to {last.name}, which left that run at epoch {ended}")
    replaced = {card["backbone"] for card in cards.values()}
    there = {path for path in folder.glob("*.*") if path.name.partition(".")[0] in replaced}
    kept = [*cards, *(path for path in folder.glob("*.safetensors") if path not in there)]
    sizes = {path.name: path.stat().st_size for path in kept if "." in path.stem}
    if sum(sizes.values()) > MAX_CHECKPOINT_BYTES:
        sizes_said = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes.items())
        limit = f"{MAX_CHECKPOINT_BYTES / 1e6:.0f} MB"
        raise ValueError(f"epochs may take {limit} together, not {sizes_said}; leave one out")
    written = []
    for path, card in cards.items():
        content, target = path.read_bytes(), folder / path.name
        write(card, target)
        write_atomically(target, content)
        written.append(target)
    for path in there - {target.with_suffix(ending) for target in written for ending in _ENDINGS}:
        path.unlink()
    return written


def _accepted(path: Path) -> dict[str, Any]:
    """The card of a file that may ship."""
    card = read_card(path)
    if card["backbone"] not in backbones.SHIPPED:
        raise ValueError(f"{path.name} is of {card['backbone']!r}; those that ship are {', '.join(backbones.SHIPPED)}")
    if problems := card_problems(path):
        raise ValueError("; ".join(problems))
    if not card["note"].strip():
        raise ValueError(f"the card of {path.name} has no note; say the licence of the data: `apthory pretrain --note`")
    if (seed := _first_run(card)["recipe"]["seed"]) != 0:
        raise ValueError(f"{path.name} began from seed {seed}, but {card['backbone']}.random is the start of seed 0")
    if not num_epochs(card):
        raise ValueError(f"{path.name} is where its run began; {card['backbone']}.random needs no file")
    return card


def _first_run(card: Mapping[str, Any]) -> Mapping[str, Any]:
    """The run that began with random weights, of those that made a file."""
    return card["before"][0] if card.get("before") else card


def _earlier(run: Mapping[str, Any]) -> str:
    return f"""
## The run before: {_length(run)}, {run["hours"]:.1f} hours
Its checkpoint has the SHA-256 `{run["sha256"]}`.

{_two_columns(run["recipe"])}

{_two_columns(run["environment"])}

{_table(run["curve"])}
"""


def _length(run: Mapping[str, Any]) -> str:
    return f"{run['epoch']} of {run['recipe']['epochs']} epochs"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)] if rows else []
    lines = ([f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _two_columns(values: Mapping[str, Any]) -> str:
    return _table([{"name": name, "value": value} for name, value in values.items()])
