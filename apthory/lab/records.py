"""Results as small JSON files that are whole or absent, named by what produced them.

A record's key is the SHA-256 of its function's name and integer version, its configuration, and the digests
of data and weights. The code is *not* part of the key, so that an edit does not throw hours of work away:
raise the version by hand when results change. Nor does a function's place matter: `versioned` gives it a name for ever
(see `apthory.lab.registry`). Beside the values stand the code's digests, the environment and the time it took.

Two environment variables serve those who change the code. ``APTHORY_COMPUTE=0`` makes computing an error, so that
whatever was recorded is either found or named as missing; ``APTHORY_KEYS`` names a file to which the key of every
record is appended that is asked for.
"""

import copy
import hashlib
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import lru_cache
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from apthory._tools.environment import environment
from apthory._tools.files import write_atomically
from apthory.lab import registry

SUITES = ("embedded", "small", "paper")
_STARTED = time.time()
_Function = TypeVar("_Function", bound=Callable)


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one function returned for one configuration; ``record["accuracy"]`` reads a value."""

    key: str  # SHA-256 of name, version, config, data and weights
    name: str  # of the function, see `versioned`: "apthory.sweeps.run_cell"
    version: int  # raised by hand when the function's results change
    config: dict[str, Any]  # keyword arguments of the function
    data: str  # digest of the data, where the configuration only names it
    weights: str  # digest of the weights, likewise
    values: dict[str, Any]  # what the function returned
    code: dict[str, str]  # module -> SHA-256 of its source
    environment: dict[str, Any]  # see `environment`
    wall_seconds: float

    def __getitem__(self, name: str) -> Any:
        if name not in self.values:
            raise KeyError(f"{self.name} recorded no {name!r}; it recorded {', '.join(self.values)}")
        return self.values[name]


class MissingRecordError(ValueError):
    """A record is not there, and ``APTHORY_COMPUTE=0`` forbids computing it."""


def versioned(version: int, *, name: str) -> Callable[[_Function], _Function]:
    """Let a function's results be recorded, under a name and a version that enter the keys of its records.

    Args:
        version: To be raised by hand when the results change.
        name: Kept for ever, wherever the function moves. Another process can tell what the records are only if the
            name stands in `apthory.lab.registry` or the module of the function was loaded.

    Raises:
        ValueError: If another function has the name.
    """

    def mark(function: _Function) -> _Function:
        registry.register_function(name, function)
        function.version, function.recorded_as = version, name  # type: ignore[attr-defined]
        return function

    return mark


def fetch(
    function: Callable[..., Mapping[str, Any]],
    config: Any,
    *,
    data: str = "",
    weights: str = "",
    sources: Sequence[ModuleType] = (),
    folder: Path,
    fresh: bool = False,
) -> Record:
    """Read the record of ``function(**config)``, or compute and write it.

    The function receives the configuration as JSON gives it back (tuples as lists, dataclasses as
    dictionaries), so that a record can be computed again from itself.

    Args:
        function: Decorated by `versioned`; returns values that JSON can hold (numbers, strings, lists, string-keyed
            mappings; arrays and tensors become lists).
        config: Its keyword arguments, as a mapping or a dataclass.
        data: Digest of the data behind the names in ``config``.
        weights: Digest of the weights behind the names in ``config``.
        sources: Modules whose code decides the values, besides the function's own.
        folder: Where records are kept; see `folder`.
        fresh: Compute even if the record exists. The environment variable ``APTHORY_FRESH`` does so for all
            records: ``1`` for those written before this process started, a Unix time for those before it.

    Raises:
        ValueError: If the function has no name for its records, or a number is not finite.
        TypeError: If configuration or values cannot be written as JSON.
        MissingRecordError: If there is no record, and ``APTHORY_COMPUTE=0`` forbids computing it.
    """
    identity = _identity(function, config, data, weights)
    path = folder / f"{_digest(identity)}.json"
    note(path.stem)
    if not fresh and (record := _usable(path)):
        return record
    if not _may_compute():
        what = "is wanted anew" if path.exists() else "is not there"
        raise MissingRecordError(
            f"the record {path.stem[:12]} of {identity['name']} {what} in {folder}, and APTHORY_COMPUTE=0 forbids "
            f"computing it: {_shortened(_json(identity))}"
        )
    start = time.perf_counter()
    returned = function(**copy.deepcopy(identity["config"]))
    seconds = time.perf_counter() - start
    record = Record(
        key=path.stem,
        **identity,
        values=_plain_mapping(returned, "values"),
        code=code_digest(sys.modules[function.__module__], *sources),
        environment=environment(),
        wall_seconds=round(seconds, 3),
    )
    content = asdict(record)
    content["sha256"] = _digest(content)
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in content.items())
    write_atomically(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())
    return record


def lookup(
    function: Callable[..., Mapping[str, Any]], config: Any, *, data: str = "", weights: str = "", folder: Path
) -> Record | None:
    """The record that `fetch` would read; None where it would compute."""
    record = _usable(folder / f"{_digest(_identity(function, config, data, weights))}.json")
    if record:
        note(record.key)
    return record


def note(key: str) -> None:
    """Append a key that is asked for to the file that ``APTHORY_KEYS`` names, if it names one."""
    if listing := os.environ.get("APTHORY_KEYS"):
        with open(listing, "a", encoding="utf-8") as file:
            file.write(f"{key}\n")


def read(path: Path) -> Record:
    """Read one record and verify that it is whole and bears its own name.

    Raises:
        ValueError: If it is not.
    """
    try:
        content = json.loads(path.read_bytes())
        seal = content.pop("sha256")
        for field in fields(Record):
            _check_kind(field.name, content[field.name])
        record = Record(**content)
        key = _digest({name: content[name] for name in ("name", "version", "config", "data", "weights")})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a whole record: {error}") from error
    if seal != _digest(content) or not key == record.key == path.stem:
        raise ValueError(f"{path} is not a whole record: its digests do not fit its content")
    return record


def name_of(function: Callable[..., Any]) -> str:
    """The name under which records of a function are kept.

    Raises:
        ValueError: If it has none.
    """
    if name := getattr(function, "recorded_as", ""):
        return name
    place = f"{function.__module__}.{function.__qualname__}"
    raise ValueError(f"{place} has no name for its records; decorate it: @records.versioned(1, name={place!r})")


def load_all(folder: Path, name: str | None = None) -> list[Record]:
    """All whole records of a folder, in the order of their keys; only those of one function if named."""
    records = []
    for path in sorted(folder.glob("*.json")):
        record = _read_or_set_aside(path)
        if record and name in (None, record.name):
            records.append(record)
    return records


def citation(records: Iterable[Record | str]) -> list[str]:
    """Short names of records (12 digits of the key), sorted: what figures and verdicts carry."""
    keys = (record if isinstance(record, str) else record.key for record in records)
    return sorted({key[:12] for key in keys})


def find(cited: str, folder: Path) -> Path | None:
    """The file of a cited record, if it is there."""
    return next(iter(sorted(folder.glob(f"{cited}*.json"))), None)


def superseded(record: Record) -> str:
    """Say why a record is no longer what its function would return; empty if it still is."""
    try:
        version = registry.find_function(record.name).version  # type: ignore[attr-defined]
    except LookupError as error:
        return str(error.args[0])
    return "" if version == record.version else f"{record.name} is at version {version}, not {record.version}"


def changed_code(record: Record) -> list[str]:
    """Modules whose source is not the one that made the record. That alone does not invalidate it.

    A module that is not there under its old name any more is left out: see `gone_code`.
    """
    return [name for name, digest in record.code.items() if _source_digest(name) not in (digest, "missing")]


def gone_code(record: Record) -> list[str]:
    """Modules that made the record and are not found under these names any more: moved or deleted."""
    return [name for name in record.code if _source_digest(name) == "missing"]


def recompute(record: Record, *, rtol: float = 0.01, atol: float = 1e-6) -> list[str]:
    """Run a record's function again; one line for every value beyond tolerance.

    Timings (values named ``*seconds`` or ``*_per_second``) are not compared, nor values that the record lacks, because
    its function came to give them later.
    """
    if reason := superseded(record):
        raise ValueError(f"record {record.key[:12]} cannot be computed again: {reason}")
    if not _may_compute():
        raise MissingRecordError(f"record {record.key[:12]} is not computed again: APTHORY_COMPUTE=0 forbids it")
    function = registry.find_function(record.name)
    values = _plain_mapping(function(**copy.deepcopy(record.config)), "values")
    return list(_differences(record.values, values, "values", rtol, atol))


def code_digest(*modules: ModuleType) -> dict[str, str]:
    """SHA-256 of each module's source as it was when first asked for, whatever is edited while a process runs.

    Of a package, all modules in it.
    """
    return {name: _first_digest(name) for module in modules for name in _modules_of(module)}


def _modules_of(module: ModuleType) -> list[str]:
    """The module's name, and those of the modules in it if it is a package."""
    names = [module.__name__]
    for folder in map(Path, getattr(module, "__path__", ())):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            names.append(".".join([module.__name__, *(part for part in parts if part != "__init__")]))
    return sorted(set(names))


def root() -> Path:
    """The project: ``APTHORY_ROOT``, else the nearest folder with notebooks/ and figures/, else here."""
    if given := os.environ.get("APTHORY_ROOT"):
        return Path(given)
    here = Path.cwd()
    for candidate in (here, *here.parents):
        if (candidate / "notebooks").is_dir() and (candidate / "figures").is_dir():
            return candidate
    return here


def folder(suite: str) -> Path:
    """Where the records of a suite are kept."""
    return suite_folder(suite) / "records"


def suite_folder(suite: str) -> Path:
    """Where the figures of a suite are kept."""
    if suite not in SUITES:
        raise ValueError(f"no suite {suite!r}; there are {', '.join(SUITES)}")
    return root() / "figures" / suite


def _identity(function: Callable[..., Any], config: Any, data: str, weights: str) -> dict[str, Any]:
    """What a record's key is the digest of."""
    return {
        "name": name_of(function),
        "version": function.version,  # type: ignore[attr-defined]
        "config": _plain_mapping(config, "config"),
        "data": data,
        "weights": weights,
    }


def _usable(path: Path) -> Record | None:
    return None if _predates_run(path) else _read_or_set_aside(path)


def _read_or_set_aside(path: Path) -> Record | None:
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        with suppress(FileNotFoundError):  # another process was faster
            path.replace(path.with_name(f"{path.name}.corrupt"))
        warnings.warn(f"{error}; set aside as {path.name}.corrupt", RuntimeWarning, stacklevel=3)
        return None


def _predates_run(path: Path) -> bool:
    asked = os.environ.get("APTHORY_FRESH", "")
    if asked in ("", "0") or not path.exists():
        return False
    return path.stat().st_mtime < (_STARTED if asked == "1" else float(asked))


def _json(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest(content: Any) -> str:
    return hashlib.sha256(_json(content).encode()).hexdigest()


def _plain_mapping(value: Any, path: str) -> dict[str, Any]:
    plain = _plain(value, path)
    if not isinstance(plain, dict):
        raise TypeError(f"{path} must be a mapping or a dataclass, not {type(value).__name__}")
    return plain


def _plain(value: Any, path: str) -> Any:
    """The value in JSON's own types; errors name the place."""
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{path} is {value}; a record holds finite numbers only")
        return float(value)
    if isinstance(value, Mapping):
        if strangers := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"{path} has the key {strangers[0]!r}; keys are strings")
        return {key: _plain(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{path}[{index}]") for index, item in enumerate(value)]
    if hasattr(value, "tolist"):  # NumPy arrays and scalars, tensors
        return _plain(value.tolist(), path)
    raise TypeError(f"{path} is a {type(value).__name__}, which JSON cannot hold; convert it first")


def _differences(old: Any, new: Any, path: str, rtol: float, atol: float) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() <= new.keys():
        for name in old:
            if not name.endswith(("seconds", "_per_second")):
                yield from _differences(old[name], new[name], f"{path}.{name}", rtol, atol)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _differences(before, after, f"{path}[{index}]", rtol, atol)
    elif _is_number(old) and _is_number(new):
        if not math.isclose(old, new, rel_tol=rtol, abs_tol=atol):
            yield f"{path} was {old:.6g}, is {new:.6g}"
    elif old != new:
        yield f"{path} was {old!r}, is {new!r}"


_FIELD_TYPES = {
    "version": int,
    "config": dict,
    "values": dict,
    "code": dict,
    "environment": dict,
    "wall_seconds": int | float,
}


def _check_kind(name: str, value: Any) -> None:
    """Raise TypeError unless a field of a record is of its kind; what is not listed is text."""
    kind = _FIELD_TYPES.get(name, str)
    if not isinstance(value, kind) or (
        name == "code" and not all(isinstance(digest, str) for digest in value.values())
    ):
        raise TypeError(f"its field {name!r} is {type(value).__name__}, {str(value)[:40]!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _may_compute() -> bool:
    switch = os.environ.get("APTHORY_COMPUTE", "1")
    if switch not in ("0", "1"):
        raise ValueError(
            f"APTHORY_COMPUTE is {switch!r}; expected 0, which makes computing an error, or 1 (the default)"
        )
    return switch == "1"


def _shortened(text: str, length: int = 1000) -> str:
    return text if len(text) <= length else f"{text[:length]} ..."


@lru_cache
def _first_digest(name: str) -> str:
    return _source_digest(name)


def _source_digest(name: str) -> str:
    """SHA-256 of a module's source, found without running any code: `importlib.util.find_spec` imports packages."""
    places: list[str] | None = None
    origin = None
    for length in range(1, name.count(".") + 2):
        spec = PathFinder.find_spec(".".join(name.split(".")[:length]), places)
        if spec is None:
            return "missing"
        places, origin = list(spec.submodule_search_locations or ()), spec.origin
    if origin is None or not origin.endswith(".py") or not Path(origin).is_file():
        return "missing"
    return hashlib.sha256(Path(origin).read_text("utf-8").encode()).hexdigest()
