"""BibTeX of this software and of the works that it studies, from CITATION.cff."""

from typing import Any

from apthory._tools.extras import from_extra
from apthory.lab import records


def entries() -> list[str]:
    """BibTeX entries: the software, then its references.

    Raises:
        FileNotFoundError: If the project has no CITATION.cff.
    """
    with from_extra("studies"):
        import yaml

    path = records.root() / "CITATION.cff"
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; call this from the repository or set APTHORY_ROOT")
    software = yaml.safe_load(path.read_text("utf-8"))
    return [_bibtex(work) for work in (software, *software.get("references", ()))]


def _bibtex(work: dict[str, Any]) -> str:
    """A work of CITATION.cff, the software itself or one of its references, as a BibTeX entry."""
    names = [[person.get("family-names"), person.get("given-names")] for person in work["authors"]]
    authors = [
        f"{{{person['name']}}}" if "name" in person else ", ".join(filter(None, name))
        for person, name in zip(work["authors"], names, strict=True)
    ]
    year = str(work.get("year") or work.get("date-released", ""))[:4]
    identifiers = [identifier["value"] for identifier in work.get("identifiers", ())]
    entries = {
        "title": f"{{{work['title']}}}",
        "author": " and ".join(authors),
        "year": year,
        "version": work.get("version"),
        "url": work.get("repository-code") or work.get("url"),
        "note": ", ".join([*identifiers, *filter(None, [work.get("notes")])]),
    }
    is_software = "cff-version" in work
    key = work["title"] if is_software else f"{names[0][0]}{year}".lower()
    lines = [f"  {name:<7} = {{{value}}}" for name, value in entries.items() if value]
    return f"@{'software' if is_software else 'misc'}{{{key},\n" + ",\n".join(lines) + "\n}"
