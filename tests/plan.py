"""Which of the collected tests run, and in which order: shuffled, one part of several, or those not yet passed.

--shuffle SEED   modules, and the tests in each, in an order that the seed decides
--rotate K/N     a part of N that their names decide, the same for K and for K + N; parts 0 to N - 1 are all tests
--resume         leaves out what has passed in this state of the tree; build/test-all/ remembers it test by test
"""

import argparse
import hashlib
import random
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

_TREE = ("apthory", "tests", "notebooks", "figures", "pyproject.toml", "constraints.txt", "README.md", "Makefile")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("apthory", "order and choice of tests")
    group.addoption("--shuffle", type=int, metavar="SEED", help="modules and their tests in an order of this seed")
    group.addoption("--rotate", type=_part, metavar="K/N", help="only the K-th of N parts of the tests")
    group.addoption("--resume", action="store_true", help="leave out what has passed in this state of the tree")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Plan(config))


class Plan:
    """The controller reads and writes the ledger; what it read is what every worker leaves out."""

    def __init__(self, config: pytest.Config) -> None:
        self.shuffle, self.rotate = config.getoption("shuffle"), config.getoption("rotate")
        self.ledger: Path | None = None
        self.passed, self.failed = set[str](), set[str]()
        worker = getattr(config, "workerinput", None)
        if worker is not None:
            self.passed = set(worker["passed"])
        elif config.getoption("resume"):
            self.ledger = config.rootpath / "build" / "test-all" / f"{digest(config.rootpath)[:16]}.txt"
            self.ledger.parent.mkdir(parents=True, exist_ok=True)
            self.ledger.touch()
            self.passed = set(self.ledger.read_text().splitlines())

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node) -> None:  # type: ignore[no-untyped-def]
        node.workerinput["passed"] = sorted(self.passed)

    def pytest_report_header(self) -> list[str]:
        return [f"{len(self.passed)} tests have passed in this state of the tree: {self.ledger}"] if self.ledger else []

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        left = [item for item in items if item.nodeid not in self.passed and self._is_in_part(item.nodeid)]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(left)])
        if self.shuffle is not None:
            order = random.Random(self.shuffle)
            keys = {path: order.random() for path in sorted({str(item.path) for item in left})}
            order.shuffle(left)
            left.sort(key=lambda item: keys[str(item.path)])
        items[:] = left

    def _is_in_part(self, name: str) -> bool:
        return self.rotate is None or zlib.crc32(name.encode()) % self.rotate[1] == self.rotate[0]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.outcome != "passed":
            self.failed.add(report.nodeid)  # or skipped: it is tried again
        elif report.when == "teardown" and report.nodeid not in self.failed and self.ledger is not None:
            with self.ledger.open("a") as file:
                file.write(f"{report.nodeid}\n")

    @pytest.hookimpl(wrapper=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> Iterator[None]:
        """That nothing is left to run is no failure."""
        yield
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and (self.ledger or self.rotate):
            session.exitstatus = pytest.ExitCode.OK


def digest(root: Path) -> str:
    """Of all files that tests depend on."""
    total = hashlib.sha256()
    for name in _TREE:
        for path in sorted([root / name, *(root / name).rglob("*")]):
            if path.is_file() and not {"__pycache__", ".ipynb_checkpoints"} & set(path.parts):
                total.update(f"{path.relative_to(root)} {path.stat().st_size} ".encode() + path.read_bytes())
    return total.hexdigest()


def _part(text: str) -> tuple[int, int]:
    part, _, num = text.partition("/")
    if not (part.isdecimal() and num.isdecimal() and int(num)):
        raise argparse.ArgumentTypeError(f"{text!r}; expected a part and how many there are, such as 0/7")
    return int(part) % int(num), int(num)
