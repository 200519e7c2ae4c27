"""Order and choice of tests: a run that was stopped goes on, parts make up the whole, a seed makes the order."""

from pathlib import Path

import pytest

MODULE = """
import pytest

@pytest.mark.parametrize("number", range(6))
def test_it(number):
    assert not (FAILS and number == 3)

def test_skipped():
    pytest.skip("not here")
"""


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
    """Two modules of six tests and a skipped one; gives names in the order in which they ran, outcomes, exit status."""
    pytester.makeini(f"[pytest]\npythonpath = {Path(__file__).parent}")
    for name in ("test_one", "test_two"):
        pytester.path.joinpath(f"{name}.py").write_text(f"FAILS = {name == 'test_two'}\n{MODULE}")
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)

    def run(*arguments: str) -> tuple[list[str], dict[str, int], int]:
        start = pytester.runpytest_subprocess if "-n" in arguments else pytester.runpytest_inprocess
        result = start("-v", "-p", "plan", "-p", "no:cacheprovider", *arguments)
        words = [line.split() for line in result.outlines if "::" in line and "%]" in line]
        names = [next(word for word in line if "::" in word) for line in words]
        return names, result.parseoutcomes() if result.outlines else {}, int(result.ret)

    return run


@pytest.mark.parametrize("workers", [[], pytest.param(["-n", "2"], marks=pytest.mark.slow)])
def test_what_passed_is_left_out_until_the_tree_changes(workers: list[str], run, pytester: pytest.Pytester):
    first, outcomes, code = run("--resume", *workers)
    assert (len(first), outcomes["passed"], outcomes["failed"], outcomes["skipped"], code) == (14, 11, 1, 2, 1)
    again, outcomes, code = run("--resume", *workers)
    assert {name.split("::")[1] for name in again} == {"test_it[3]", "test_skipped"}
    assert (outcomes["failed"], outcomes["skipped"], code) == (1, 2, 1)
    pytester.path.joinpath("pyproject.toml").write_text("")
    assert len(run("--resume", *workers)[0]) == 14


def test_nothing_left_is_no_failure(run):
    chosen = ["test_one.py", "-k", "test_it"]
    assert run("--resume", *chosen)[2] == 0
    names, _, code = run("--resume", *chosen)
    assert (names, code) == ([], 0)


@pytest.mark.slow
def test_parts_make_up_the_whole_and_do_not_overlap(run):
    parts = [set(run("--rotate", f"{part}/3")[0]) for part in range(3)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 14
    assert set(run("--rotate", "4/3")[0]) == parts[1]


def test_a_part_that_there_is_not_is_an_error(run):
    assert run("--rotate", "3")[2] == pytest.ExitCode.USAGE_ERROR


@pytest.mark.slow
def test_a_seed_decides_the_order_of_modules_and_of_tests(run):
    plain = run()[0]
    orders = [run("--shuffle", str(seed))[0] for seed in (1, 1, 2, 3)]
    assert orders[0] == orders[1] != plain
    assert all(sorted(order) == sorted(plain) for order in orders)
    assert {order[0].split("::")[0] for order in orders} == {"test_one.py", "test_two.py"}
