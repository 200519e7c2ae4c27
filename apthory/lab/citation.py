"""BibTeX of this software and of the works that it studies."""

from apthory.lab import records


def bibtex() -> str:
    """The entries of CITATION.bib: the software, then the works that CITATION.cff refers to.

    Raises:
        FileNotFoundError: If the project has no CITATION.bib.
    """
    path = records.root() / "CITATION.bib"
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; call this from the repository or set APTHORY_ROOT")
    return path.read_text("utf-8").rstrip()
