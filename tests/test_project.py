"""The project's own promises: directions of imports, pinned packages, one version, no machine's paths."""

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import yaml
from imports import MODULES, floors, graph, imports, ours, rooms
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]

# One rule: the library <- lab, studies, benchmarks <- the command. `lab` and the library do not import each other; both
# stand on `_tools`. A room is a module or package directly inside apthory/.
LIBRARY = {
    "sites", "tasks", "backbones", "heads", "metrics", "theory", "methods", "equivalence", "costs", "training",
    "selection", "pretraining", "clip",
}  # fmt: skip
ABOVE = {"studies", "benchmarks"}
MAY_IMPORT = {
    "_tools": set(),
    "__init__": LIBRARY | {"_tools"},
    "lab": {"_tools"},
    **{room: LIBRARY | {"_tools"} for room in LIBRARY},
    **{room: LIBRARY | {"_tools", "lab"} | ABOVE for room in ABOVE},
    "__main__": LIBRARY | {"_tools", "lab"} | ABOVE,
    # Narrower than the rule: theory knows no network, metrics know no training.
    "theory": set(),
    "metrics": {"sites", "_tools"},
}
# The only modules of ours that may import a package of others.
ONLY_IN = {
    "timm": {"sites.tracing", "backbones.loading", "backbones.frozen", "metrics.attention", "pretraining.run"},
    "torchvision": {"pretraining.run", "pretraining.augmentation", "methods.pixels.augmentation"},
    "datasets": {"tasks.readers"},
    "open_clip": {"backbones.clip_towers"},
    "matplotlib": {"lab.figures"},
    "seaborn": set(),  # in notebooks alone
    "papermill": {"lab.notebooks"},
    "jupytext": {"lab.notebooks"},
}
INSTALLED = ("dev", "studies", "data", "open-clip")  # extras that `make` installs
# Names that differ from pyproject.toml's: of what is imported, and of conda-forge's packages.
REQUIREMENTS = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "sklearn": "scikit-learn",
    "skimage": "scikit-image",
    "open_clip": "open-clip-torch",
    "torch_cka": "torch-cka",
}
CONDA_NAMES = {"pytorch": "torch", "matplotlib-base": "matplotlib", "seaborn-base": "seaborn"}


# ----------------------------------------------------------------------------------- directions of imports


def test_imports_are_read_in_every_spelling():
    source = "\n".join([
        "import apthory.sites as s",
        "from apthory import prompts, tasks",
        "from .similarity import cka",
        "from ..records import fetch",
        "from . import attention",
        "def late():",
        "    import peft.tuners",
    ])  # fmt: skip
    found = imports(source, "metrics.spectrum")
    assert found == [
        ("apthory.sites", True),
        ("apthory.prompts", True),
        ("apthory.tasks", True),
        ("apthory.metrics.similarity.cka", True),
        ("apthory.records.fetch", True),
        ("apthory.metrics.attention", True),
        ("peft.tuners", False),
    ]
    modules = {"sites", "metrics.__init__", "metrics.similarity", "records"}
    assert [ours(name, modules) for name, _ in found[:1] + found[3:5] + found[6:]] == [
        "sites", "metrics.similarity", "records", None,
    ]  # fmt: skip
    assert ours("apthory.metrics.cka", modules) == "metrics.__init__"
    assert ours("apthory.fit", modules) == "__init__"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_of_our_modules_point_one_way(module):
    room = module.split(".")[0]
    assert room in MAY_IMPORT, f"{room} is no room of the house; see CONTRIBUTING.md for where things belong"
    wrong = {name for name in graph()[module] if name.split(".")[0] not in MAY_IMPORT[room] | {room}}
    assert not wrong, f"{module} imports {sorted(wrong)}; {room} may import {sorted(MAY_IMPORT[room])}"


def test_the_house_has_few_rooms_and_no_circle():
    house = rooms()
    floors(house)  # raises where there is a circle
    assert len(house) < 20
    assert sum(map(len, house.values())) < 90


def test_imports_of_our_modules_make_no_circle():
    graphlib.TopologicalSorter(graph()).prepare()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_packages_are_imported_where_design_puts_them(module):
    packages = {name.split(".")[0] for name, _ in imports(MODULES[module].read_text(), module)}
    wrong = {package for package in packages & ONLY_IN.keys() if module not in ONLY_IN[package]}
    assert not wrong, f"{module} imports {sorted(wrong)}; only these may: {[ONLY_IN[name] for name in wrong]}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imported_packages_are_declared(module):
    project, extras = declared()
    core = {requirement.name for requirement in project}
    optional = {requirement.name for group in extras.values() for requirement in group}
    for name, on_load in imports(MODULES[module].read_text(), module):
        package = name.split(".")[0]
        if package == "apthory" or package in sys.stdlib_module_names:
            continue
        requirement = REQUIREMENTS.get(package, package)
        assert requirement in core | optional, f"{module} imports {package}; pyproject.toml does not name it"
        assert requirement in core or not on_load, f"{module} imports {package} on load; do it in use"


def test_every_extra_is_used():
    sources = [*MODULES.values(), *(ROOT / "notebooks").glob("*.py")]
    used = {name.split(".")[0] for path in sources for name, _ in imports(path.read_text(), "")}
    used = {REQUIREMENTS.get(package, package) for package in used}
    _, extras = declared()
    for extra in extras.keys() - {"dev"}:
        assert used & {requirement.name for requirement in extras[extra]}, f"nothing imports a package of {extra!r}"


def test_make_installs_the_extras():
    assert f"'.[{','.join(INSTALLED)}]'" in (ROOT / "Makefile").read_text()
    assert f"'.[{','.join(INSTALLED)}]'" in (ROOT / "constraints.txt").read_text()


# ------------------------------------------------------------------------------------ names of definitions


def defined(statements: Iterable[ast.stmt]) -> Iterator[str]:
    """Names that a module defines at its top level, also inside `if`, `for`, `with` and `try`; no dunders.

    A command in `__main__` does not count: nobody imports it, and its name is the word that users type.
    """
    for statement in statements:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [] if "app.command()" in map(ast.unparse, statement.decorator_list) else [statement.name]
        elif isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            parts = [node for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]
            names = [part.id for part in parts if isinstance(part.ctx, ast.Store)]
        else:
            blocks = [getattr(statement, block, []) for block in ("body", "orelse", "finalbody", "handlers")]
            names = [name for block in blocks for name in defined(block)]
        yield from (name for name in names if not name.startswith("__"))


def test_definitions_are_read_in_every_spelling():
    source = """
from a import b as c
def f(): g = 1
class D: h = 1
i = j, (k, *_l) = m[n] = 1
o: int = 1
try: p = 1
except E: q = 1
else:
    if r: s = 1
__t__ = 1
@app.command()
def u(): ...
"""
    assert list(defined(ast.parse(source).body)) == ["f", "D", "i", "j", "k", "_l", "o", "p", "s", "q"]


def test_each_top_level_name_is_defined_once():
    homes: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        for name in defined(ast.parse(path.read_text("utf-8")).body):
            homes.setdefault(name, set()).add(module)
    twice = {name: modules for name, modules in homes.items() if len(modules) > 1}
    assert not twice


# ----------------------------------------------------------------------------------- packages and versions


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def declared() -> tuple[list[Requirement], dict[str, list[Requirement]]]:
    """The requirements of the package, and those of each extra."""
    project = pyproject()["project"]
    extras = {name: list(map(Requirement, group)) for name, group in project["optional-dependencies"].items()}
    return list(map(Requirement, project["dependencies"])), extras


def direct() -> dict[str, Requirement]:
    """What `make` installs and the figures are made with: the package's requirements, and those of most extras."""
    project, extras = declared()
    installed = [*project, *(one for name in INSTALLED for one in extras[name])]
    return {canonicalize_name(requirement.name): requirement for requirement in installed}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    assert all(len(pair) == 2 for pair in pairs), "constraints.txt holds exact versions only"
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.mark.parametrize("name", sorted(direct()))
def test_every_direct_dependency_is_pinned_within_its_bounds(name):
    assert name in pins()
    assert direct()[name].specifier.contains(pins()[name])


def test_every_dependency_has_its_reason():
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    project, extras = declared()
    for requirement in [*project, *(one for group in extras.values() for one in group)]:
        with_reason = re.compile(rf'\s*"{requirement.name}[\[>][^"]+",\s+# \w')
        assert sum(with_reason.match(line) is not None for line in lines) == 1, requirement.name


def test_conda_environment_is_the_same_set():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pinned = dict(line.split("=") for line in environment["dependencies"] if "=" in line)
    assert pinned.pop("python") == "3.11"
    versions = {CONDA_NAMES.get(name, name): version for name, version in pinned.items()}
    assert versions == {name: pins()[name] for name in direct()}
    assert [entry for entry in environment["dependencies"] if "=" not in entry] == ["pip", {"pip": ["-e ."]}]


def test_version_is_said_once_and_the_same_everywhere():
    source = (ROOT / "apthory" / "__init__.py").read_text()
    (version,) = re.findall(r'^__version__ = "([^"]+)"$', source, flags=re.MULTILINE)
    project = pyproject()
    assert "version" not in project["project"]
    assert project["tool"]["hatch"]["version"]["path"] == "apthory/__init__.py"
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_both_citation_files_cite_the_same_works():
    def author(person):
        return f"{{{person['name']}}}" if "name" in person else f"{person['family-names']}, {person['given-names']}"

    software = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    works = [software, *software["references"]]
    entries = re.split(r"\n(?=@)", (ROOT / "CITATION.bib").read_text())
    for work, entry in zip(works, entries, strict=True):
        fields = dict(re.findall(r"^  (\w+) += \{(.*)\},?$", entry, flags=re.MULTILINE))
        assert fields["title"] == f"{{{work['title']}}}"
        assert fields["author"].split(" and ") == [author(person) for person in work["authors"]]
        for name in ("year", "version", "doi"):
            assert fields.get(name) == (str(work[name]) if name in work else None), (work["title"], name)
        identifiers = [f"{fields['archiveprefix']}:{fields['eprint']}"] if "eprint" in fields else []
        assert identifiers == [identifier["value"] for identifier in work.get("identifiers", [])]
        assert fields.get("note") == work.get("notes")


# ------------------------------------------------------------------------------------- what a reader meets


def test_readme_gives_the_two_commands():
    readme = (ROOT / "README.md").read_text()
    assert "make test" in readme
    assert "make figures" in readme


def test_the_glossary_is_linked_and_gives_each_word_one_sentence():
    for page in ("README.md", "CONTRIBUTING.md"):
        assert "[GLOSSARY.md](GLOSSARY.md)" in (ROOT / page).read_text()
    for entry in (ROOT / "GLOSSARY.md").read_text().split("\n- ")[1:]:
        words, _, sentence = " ".join(entry.partition("\n\n")[0].split()).partition(": ")
        assert re.fullmatch(r"\*\*[a-z ]+\*\*(, \*\*[a-z ]+\*\*)?", words), entry
        assert sentence.endswith((".", ".)")), entry
        assert ". " not in sentence, entry


def test_every_make_target_says_what_it_does():
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)
    described = set(re.findall(r"^([a-z-]+):.*## \S", makefile, flags=re.MULTILINE))
    assert described == set(phony.split()) - {"venv"}


def test_package_ships_its_types():
    assert (ROOT / "apthory" / "py.typed").is_file()


def repository_files() -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listing.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file()]


MACHINE_PATH = re.compile(rb"(?<![\w.~}])/(?:root|work|tmp|home|Users|opt|mnt)/\w")
REGISTRY = re.compile(rb"pypi\.org|pythonhosted\.org|download\.pytorch\.org|anaconda\.org|index[-]url|find[-]links")


@pytest.mark.parametrize("text", [b'"/tmp' + b'/x"', b"file:///" + b"root/y", b" /home" + b"/me"])
def test_machine_paths_are_recognised(text):
    assert MACHINE_PATH.search(text)


@pytest.mark.parametrize("text", [b"../work/x", b"a/tmp/b", b"$HOME/opt", b"https://x.org/home/y", b"/dev/null"])
def test_other_paths_are_left_alone(text):
    assert not MACHINE_PATH.search(text)


def test_no_file_names_a_machine_or_a_registry():
    files = repository_files()
    assert Path(__file__) in files
    found = [
        f"{path.relative_to(ROOT)}: {match.group().decode(errors='replace')}"
        for path in files
        for pattern in (MACHINE_PATH, REGISTRY)
        if (match := pattern.search(path.read_bytes()))
    ]
    assert not found
