"""What another report has otherwise."""

import json
from math import inf, nan

import pytest

import sage_compiler as sage
from sage_compiler.report import Report
from sage_compiler.report_diff import COMPARED, Change
from tests.compiler.sites import kept, site


def test_equal_reports_differ_in_nothing() -> None:
    sites = [site(), site(), kept(layer="other#0"), site(layer="nan#0", cosine=nan, rel_l1=inf)]
    found = Report(sites).diff(Report(sites))
    assert not found and (found.added, found.removed, found.changed) == ((), (), ())
    assert str(found) == "no difference"
    assert not sage.Report().diff(sage.Report())


def test_only_a_report_can_be_compared() -> None:
    with pytest.raises(TypeError, match="this is int"):
        Report().diff(3)  # type: ignore[arg-type]


def test_every_compared_field_is_told() -> None:
    changes = {
        "decision": "keep",
        "recipe": "int4_fp8",
        "mask": "none",
        "fingerprint": "q1",
        "q_shape": (1, 2),
        "kv_shape": (1, 2),
        "reason": "another",
        "cosine": 0.5,
        "rel_l1": nan,
    }
    assert tuple(changes) == COMPARED
    for field, value in changes.items():
        (change,) = Report([site()]).diff(Report([site(**{field: value})])).changed
        assert (change.layer, change.occurrence, change.field) == ("layers.0#0", 0, field)
        assert change.before == getattr(site(), field) and change.after is value


def test_predicted_times_are_not_compared() -> None:
    assert not Report([site(seconds=1.0)]).diff(Report([site(seconds=2.0, exact_seconds=3.0)]))


def test_sites_are_matched_by_layer_and_occurrence() -> None:
    first, second = site(q_shape=(1, 2, 6, 8)), site(q_shape=(1, 2, 9, 8))
    new = site(layer="new#0")
    found = Report([first, second, kept(layer="old#0")]).diff(Report([new, first, first, second]))
    assert found.added == (new, second) and found.removed == (kept(layer="old#0"),)
    assert found.changed == (Change("layers.0#0", 1, "q_shape", (1, 2, 9, 8), (1, 2, 6, 8)),)


def test_text() -> None:
    before = Report([site(cosine=0.99951234), site(), site(layer="gone#0")])
    after = Report([kept(), site(), kept(layer="new#0")])
    assert str(before.diff(after)) == (
        "1 site changed, 1 added, 1 removed\n"
        "+ new#0: keep\n"
        "- gone#0: rewrite int8_fp8\n"
        "layers.0#0\n"
        "  decision: rewrite -> keep\n"
        "  recipe: int8_fp8 -> -\n"
        "  fingerprint: q2 kv2 d8 dv8 causal -> -\n"
        "  cosine: 0.999512 -> -"
    )
    moved = Report([site(), site(q_shape=())]).diff(Report([site(), site(kv_shape=(1, 2))]))
    assert str(moved).splitlines()[1:] == [
        "layers.0#0, occurrence 1",
        "  q_shape: - -> (1, 2, 6, 8)",
        "  kv_shape: (1, 2, 6, 8) -> (1, 2)",
    ]


def test_plain_data_has_no_number_that_json_lacks() -> None:
    found = Report([site(rel_l1=inf)]).diff(Report([site(rel_l1=nan), site(cosine=-inf)]))
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["changed"] == [
        {"layer": "layers.0#0", "occurrence": 0, "field": "rel_l1", "before": None, "after": None}
    ]
    assert data["added"][0]["cosine"] is None and data["removed"] == []
