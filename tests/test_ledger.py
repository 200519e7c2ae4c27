"""Claims are fixed before they are judged, judged by one rule, and never beyond their scope."""

import json
import math
import re
from pathlib import Path

import pandas as pd
import pytest

from apthory._tools.estimate import Estimate
from apthory.lab import check, claims, figures, records

# The claims that the study set out to judge, with their numbers of statistics; dropping one fails here.
STATISTICS = {
    "AP-1": 2,
    "AP-2": 3,
    "AP-3": 5,
    "AP-4": 3,
    "AP-5a": 2,
    "AP-5b": 2,
    "AP-6": 2,
    "AP-7a": 1,
    "AP-7b": 2,
    "AP-8": 2,
    "AP-9": 3,
    "AP-10": 2,
    "AP-11": 1,
    "AP-c": 3,
    "EVP-1": 1,
    "EVP-2": 1,
    "EVP-3": 1,
    "EVP-4": 4,
    "EVP-5": 1,
    "EVP-6": 2,
    "ADA-1": 1,
    "ADA-2": 2,
    "ADA-3": 1,
    "ADA-4": 1,
}


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    monkeypatch.setenv("APTHORY_ROOT", str(tmp_path))
    return tmp_path


def judge(claim_id, value, interval=None, **options):
    options = {
        "suite": "small",
        "backbones": ["resnet_micro"],
        "tasks": ["digits", "textures"],
        "seeds": [0, 1, 2],
        "made_from": [],
        **options,
    }
    return claims.verdict(claim_id, value, interval, **options)


def test_every_claim_has_each_of_its_statistics():
    parts = [claim_id.partition(".")[0] for claim_id in claims.claims()]
    assert list(dict.fromkeys(parts))[: len(STATISTICS)] == list(STATISTICS)  # the notebooks' own claims follow
    assert {row: parts.count(row) for row in STATISTICS} == STATISTICS


@pytest.mark.parametrize("claim", claims.claims().values(), ids=lambda claim: claim.id)
def test_claims_are_complete(claim):
    assert claim.claim
    assert claim.paper
    assert claim.statistic
    assert claim.notebooks
    assert all(number.isdigit() and len(number) == 2 for number in claim.notebooks)


@pytest.mark.parametrize(
    ("threshold", "low", "high", "verdict"),
    [
        ("< 0", -2.0, -0.1, "supported"),
        ("< 0", -2.0, 0.0, "open"),
        ("< 0", 0.0, 1.0, "refuted"),
        ("> 0", 0.1, 2.0, "supported"),
        ("> 0", -0.1, 2.0, "open"),
        ("> 0", 0.0, 2.0, "open"),
        ("> 0", 0.0, 0.0, "refuted"),
        ("> 0", -2.0, -0.1, "refuted"),
        ("> -1", -0.9, 3.0, "supported"),
        (">= 1", 1.0, 1.0, "supported"),
        (">= 1", 0.0, 0.0, "refuted"),
        (">= 1", 0.5, 1.5, "open"),
        ("<= 1e-12", 3e-16, 3e-16, "supported"),
        ("<= 1e-12", 1e-12, 1e-12, "supported"),
        ("<= 1e-12", 3e-9, 3e-9, "refuted"),
        ("<= 2", 1.0, 2.5, "open"),
        ("!= 0", 0.1, 0.3, "supported"),
        ("!= 0", -0.3, -0.1, "supported"),
        ("!= 0", -0.1, 0.1, "open"),
        ("!= 0", 0.0, 0.0, "refuted"),
        ("in [0.25, 0.75]", 0.3, 0.75, "supported"),
        ("in [0.25, 0.75]", 0.2, 0.5, "open"),
        ("in [0.25, 0.75]", 0.1, 0.9, "open"),
        ("in [0.25, 0.75]", 0.8, 0.9, "refuted"),
        ("in [0.25, 0.75]", 0.0, 0.2, "refuted"),
    ],
)
def test_the_whole_interval_decides(threshold, low, high, verdict):
    claim = claims.Claim(id="X", claim="x", paper="-", statistic="s", threshold=threshold, notebooks=())
    assert claim.judge(low, high) == verdict


@pytest.mark.parametrize("threshold", ["", "<0", "about 0", "in [1]", "< zero", "== 0"])
def test_a_threshold_that_cannot_be_read_is_refused(threshold):
    with pytest.raises(ValueError, match=r"cannot read the threshold|could not convert"):
        claims.Claim(id="X", claim="x", paper="-", statistic="s", threshold=threshold, notebooks=())


def test_a_verdict_is_written_with_its_scope(project):
    record = "a" * 64
    result = judge("AP-5a.spearman", 0.62, (0.41, 0.78), made_from=[record], tag="resnet_micro", note="Early.")
    path = project / "figures" / "small" / "ledger" / "AP-5a.spearman@resnet_micro.json"
    first = path.read_bytes()
    assert json.loads(first) == {
        "id": "AP-5a.spearman",
        "claim": "CNNs prefer deep layers",
        "statistic": "Spearman correlation of depth and AP accuracy over sites, per task",
        "threshold": "> 0",
        "verdict": "supported",
        "value": 0.62,
        "low": 0.41,
        "high": 0.78,
        "suite": "small",
        "backbones": ["resnet_micro"],
        "tasks": ["digits", "textures"],
        "seeds": [0, 1, 2],
        "records": ["a" * 12],
        "tag": "resnet_micro",
        "note": "Early.",
    }
    text = repr(result)
    for part in (
        "AP-5a.spearman",
        "supported",
        "0.62 [0.41, 0.78]",
        "> 0",
        "small",
        "resnet_micro",
        "seeds 0",
    ):
        assert part in text
    assert result._repr_markdown_().startswith("**AP-5a.spearman (resnet_micro): supported.**")
    judge("AP-5a.spearman", 0.62, (0.41, 0.78), made_from=[record], tag="resnet_micro", note="Early.")
    assert path.read_bytes() == first


def test_other_models_leave_a_claim_about_named_models_not_run():
    assert judge("AP-2.size_cnn", 1.0, (0.5, 1.5)).verdict == "not run"
    assert judge("AP-2.size_cnn", 1.0, (0.5, 1.5), backbones=["resnet101.tv_in1k"]).verdict == "refuted"
    assert judge("AP-2.size_cnn", 1.0, (0.5, 1.5), backbones=["resnet101", "vit_micro"]).verdict == "not run"
    assert judge("AP-2.size_cnn", 5.0, (4.5, 5.5), backbones=[]).verdict == "not run"
    assert judge("AP-2.sign", 1.0, (0.5, 1.5)).verdict == "supported"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"claim_id": "AP-99"}, "no claim 'AP-99'; there are AP-1.full"),
        ({"interval": (1.0, 0.0)}, "must lie in a finite interval"),
        ({"value": 3.0}, "must lie in a finite interval"),
        ({"value": math.nan, "interval": None}, "must lie in a finite interval"),
        ({"interval": (-math.inf, 1.0)}, "must lie in a finite interval"),
        ({"tag": "a/b"}, "becomes part of a file name"),
        ({"suite": "tiny"}, "no suite 'tiny'"),
    ],
)
def test_a_verdict_that_makes_no_sense_is_refused_and_leaves_no_file(project, change, message):
    with pytest.raises(ValueError, match=message):
        judge(**{"claim_id": "AP-11", "value": 0.5, "interval": (0.0, 1.0), **change})
    assert list(project.rglob("*.json")) == []


def test_a_notebook_s_judge_reads_the_scope_off_its_tables(project):
    def rows(tasks, seeds, key):
        return pd.DataFrame([{"task": task, "seed": seed, "key": key * 64} for task in tasks for seed in seeds])

    judge_it = claims.Judge("small")
    first, second = rows("cab", (2, 0, 1), "a"), rows("bad", (0, 1, 3), "b")
    estimate = Estimate(value=0.5, low=0.25, high=0.75)
    result = judge_it("AP-11", estimate, rows=[first, second], backbones=["vit_micro"], tag="vit_micro", note="Yes.")
    given = {"tasks": ["a", "b"], "seeds": [0, 1], "made_from": ["a" * 64, "b" * 64]}
    expected = judge("AP-11", 0.5, (0.25, 0.75), backbones=["vit_micro"], tag="vit_micro", note="Yes.", **given)
    assert result == expected
    exact = judge_it("AP-2.sign", 1.0, tasks=["random images"], seeds=[4], made_from=["c" * 64], rows=[first])
    assert (exact.low, exact.high, exact.tasks, exact.seeds) == (1.0, 1.0, ("random images",), (4,))
    assert exact.records == ("c" * 12,)
    assert judge_it.verdicts == [result, exact]
    assert judge_it.table.to_dict("records") == [
        {"claim": "AP-11", "of": "vit_micro", "value": "0.5", "interval": "[0.25, 0.75]", "rule": "< 1",
         "verdict": "supported"},
        {"claim": "AP-2.sign", "of": "", "value": "1", "interval": "exact", "rule": "> 0", "verdict": "supported"},
    ]  # fmt: skip


def test_the_ledger_lists_every_claim_with_its_verdicts():
    judge("AP-11", 0.5, (0.2, 0.8), tag="vit_micro")
    judge("AP-11", 2.0, (1.2, 2.8), tag="resnet_micro")
    judge("AP-11", 0.9, (0.2, 1.8), suite="embedded")
    table = claims.ledger()
    assert list(dict.fromkeys(table.id)) == list(claims.claims())
    judged = table[table.id == "AP-11"]
    assert list(judged.verdict) == ["open", "refuted", "supported"]
    assert list(judged.tag) == ["", "resnet_micro", "vit_micro"]
    assert set(table[table.id != "AP-11"].verdict) == {"not run"}
    assert claims.ledger(records.root()).equals(table)


@pytest.mark.parametrize(("name", "value"), [("threshold", "< 5"), ("statistic", "another"), ("id", "AP-99")])
def test_a_verdict_by_another_rule_is_stale(project, name, value):
    judge("AP-11", 2.0, (1.2, 2.8))
    path = project / "figures" / "small" / "ledger" / "AP-11.json"
    assert not [problem for problem in check.problems() if "another rule" in problem]
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    table = claims.ledger()
    assert list(table[table.suite == "small"].verdict) == ["stale"]
    assert [problem for problem in check.problems() if "another rule" in problem]


def test_a_verdict_without_its_records_is_a_problem():
    judge("AP-11", 0.5, (0.2, 0.8), made_from=["b" * 64])
    (problem,) = check.problems()
    assert "AP-11.json: record bbbbbbbbbbbb is missing" in problem
    assert figures.record_problems(["b" * 12], "small") == ["record bbbbbbbbbbbb is missing"]


def test_the_verdicts_in_the_readme_are_those_of_the_ledger():
    repository = Path(__file__).parents[1]
    number = r"(-?[\d.]+(?:e-\d+)?)"
    rows = re.findall(
        rf"^\| (\S+) \| .* \| ([\w-]+) \| {number} (?:\[{number}, {number}\]|(of \d+ tasks)) \| (\w+) \|$",
        (repository / "README.md").read_text(),
        flags=re.MULTILINE,
    )
    assert {claim.partition("-")[0] for claim, *_ in rows} >= {"AP", "EVP", "ADA"}
    assert len(rows) >= 60
    for claim, backbone, value, low, high, count, verdict in rows:
        file = repository / "figures" / "small" / "ledger" / f"{claim}@{backbone}.json"
        judged = json.loads(file.read_text())
        assert judged["verdict"] == verdict, claim
        if count:
            assert (value, count) == (f"{judged['value']:g}", judged["note"]), (claim, backbone)
            continue
        digits = ".2f" if abs(judged["value"]) >= 0.005 else ".0e"
        for shown, name in ((value, "value"), (low, "low"), (high, "high")):
            assert shown == f"{judged[name]:{digits}}", (claim, backbone, name)


def test_two_tasks_that_agree_to_the_last_digit_decide_nothing(project):
    given = {"backbones": ["vit_micro"], "seeds": [0]}
    assert judge("AP-11", 0.0, (0.0, 0.0), tasks=["a", "b"], **given).verdict == "open"
    assert judge("AP-11", 0.0, (0.0, 0.0), tasks=["a", "b", "c", "d"], **given).verdict == "supported"
    assert judge("AP-11", 0.0, None, tasks=["a", "b"], **given).verdict == "supported"  # an exact quantity
