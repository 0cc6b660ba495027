"""Policies as objects and as files: what a file holds is data, whatever it holds."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_compiler import files, policy_json
from sage_compiler.errors import PolicyError
from sage_compiler.metrics import LAYER_METRICS, Errors
from sage_compiler.policy import (
    CHOICES,
    MOST_RANGES,
    Calibration,
    EndToEnd,
    LayerPolicy,
    Policy,
)
from sage_compiler.precision import EXACT, RECIPES

NONE, CAUSAL = "q4 kv4 d64 dv64 none", "q4 kv4 d64 dv64 causal"


def errors(cosine: float = 0.999, rel_l1: float = 0.03, calls: int = 2) -> Errors:
    return Errors(cosine, rel_l1, 0.01, cosine - 0.1, 2 * rel_l1, cosine, rel_l1, calls=calls)


def example() -> Policy:
    """A policy with everything that one can have."""
    return Policy(
        {
            "blocks.0.attn#0": LayerPolicy(
                (NONE,),
                ("int8_int8", EXACT),
                "the cheapest within the budget",
                ({"int8_int8": errors()}, {"int8_int8": errors(0.9, 0.3)}),
                {"int8_int8": 1e-3, EXACT: 2e-3},
            ),
            "blocks.1.attn#0": LayerPolicy(
                (NONE, CAUSAL),
                ("int4_fp8",),
                "größer als \u4e00 \U0001f600",
                ({"int4_fp8": errors()}, {"int4_fp8": errors(0.99, float("inf"))}),
                {"int4_fp8": 1e-3, EXACT: 4e-3},
            ),
            "blocks.2.attn#0": LayerPolicy((CAUSAL,), (EXACT,), seconds={EXACT: 1e-3}),
        },
        target="sm_89",
        timestep_ranges=2,
        calibration=Calibration(
            budget={"cosine": 0.99, "rel_l1": 0.05},
            candidates=("int8_int8", "int4_fp8"),
            inputs=3,
            interrupted=True,
            device="a machine",
            versions={"torch": "2.13.0"},
            times="timed on this machine",
            subset="every 2nd token",
            parts={"measuring": 3.5},
            end_to_end=EndToEnd("output_rel_l1", 0.01, 0.8, 0.007, True, 4),
            model_seconds={"exact": 0.2, "policy": 0.1},
        ),
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "policy.json"


@pytest.fixture
def data() -> dict[str, Any]:
    """The example as plain data, to be damaged."""
    return json.loads(json.dumps(example().to_dict()))


def write(path: Path, data: object) -> Path:
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


# --- round trip -----------------------------------------------------------------------------

texts = st.text(st.characters(categories=["L", "N", "P", "S"]), max_size=12)  # the printable ones
finite = st.floats(allow_nan=False, allow_infinity=False)
amounts = st.floats(0, allow_nan=False)  # infinite where an output is NaN
cosines = st.floats(-1, 1)
counts = st.integers(0, 10**9)
recipes = st.sampled_from(CHOICES)
measurements = st.builds(
    Errors, cosines, amounts, amounts, cosines, amounts, cosines, amounts, counts
)
ends = st.builds(EndToEnd, texts, finite, finite, st.none() | amounts, st.booleans(), counts)
calibrations = st.builds(
    Calibration,
    budget=st.dictionaries(st.sampled_from(LAYER_METRICS), finite),
    candidates=st.lists(recipes, max_size=3).map(tuple),
    inputs=counts,
    interrupted=st.booleans(),
    device=texts,
    versions=st.dictionaries(texts, texts, max_size=2),
    times=texts,
    subset=texts,
    parts=st.dictionaries(texts, finite, max_size=2),
    end_to_end=st.none() | ends,
    model_seconds=st.dictionaries(texts, finite, max_size=2),
)


def layers(ranges: int) -> st.SearchStrategy[LayerPolicy]:
    part = st.dictionaries(st.sampled_from(list(RECIPES)), measurements, max_size=2)
    return st.builds(
        LayerPolicy,
        fingerprints=st.lists(texts, min_size=1, max_size=2).map(tuple),
        recipes=st.sampled_from([1, ranges]).flatmap(lambda size: st.tuples(*[recipes] * size)),
        reason=texts,
        measured=st.just(()) | st.tuples(*[part] * ranges),
        seconds=st.dictionaries(recipes, finite, max_size=2),
    )


@st.composite
def policies(draw: Callable[[Any], Any]) -> Policy:
    ranges = draw(st.integers(1, 4))
    return Policy(
        draw(st.dictionaries(texts, layers(ranges), max_size=3)),
        target=draw(texts),
        timestep_ranges=ranges,
        calibration=draw(calibrations),
    )


@given(policies())
@settings(max_examples=60)
def test_a_saved_policy_is_the_same_when_loaded(
    tmp_path_factory: pytest.TempPathFactory, policy: Policy
) -> None:
    path = tmp_path_factory.getbasetemp() / "round_trip.json"
    policy.save(path)
    loaded = Policy.load(path)
    assert loaded == policy
    # `==` goes by what is saved; these do not.
    assert list(loaded.layers.items()) == list(policy.layers.items())
    assert loaded.calibration == policy.calibration
    assert (loaded.target, loaded.timestep_ranges) == (policy.target, policy.timestep_ranges)
    assert str(loaded) == str(policy)
    first = path.read_bytes()
    loaded.save(path)
    assert path.read_bytes() == first


@pytest.mark.parametrize("given", [str, Path, os.fspath], ids=["str", "Path", "fspath"])
def test_paths_of_every_kind(path: Path, given: Callable[[Path], Any]) -> None:
    example().save(given(path))
    assert Policy.load(given(path)) == example()


@pytest.mark.parametrize("worst", [None, 0.5, float("inf")])
def test_an_unknown_end_is_not_an_infinite_one(path: Path, worst: float | None) -> None:
    end = EndToEnd("output_rel_l1", 0.01, 1.0, worst, False, 1)
    policy = Policy({}, target="cpu", calibration=Calibration(end_to_end=end))
    policy.save(path)
    loaded = Policy.load(path)
    assert loaded.calibration.end_to_end == end and str(loaded) == str(policy)


def test_files_are_text_that_can_be_compared_line_by_line(path: Path) -> None:
    before, after = example(), example()
    layer = after.layers["blocks.2.attn#0"]
    after.layers["blocks.2.attn#0"] = LayerPolicy(layer.fingerprints, ("int8_int8",))
    lines = []
    for policy in (before, after):
        policy.save(path)
        lines.append(path.read_text(encoding="utf-8").splitlines())
    changed = set(lines[0]) ^ set(lines[1])
    assert 2 <= len(changed) <= 4
    assert any('"recipe": "int8_int8"' in line for line in changed)
    assert max(map(len, lines[0])) < 100
    assert "größer als \u4e00 \U0001f600" in "\n".join(lines[0])


# --- saving ---------------------------------------------------------------------------------


def only(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


@pytest.mark.parametrize("function", ["replace", "write"])
def test_a_failing_write_leaves_the_old_file(
    path: Path, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    example().save(path)
    old = path.read_bytes()
    real_open = open

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    class Full:
        """A file that takes nothing; its own write cannot be replaced."""

        def __init__(self, *args: Any) -> None:
            self.file = real_open(*args)

        def __enter__(self) -> Any:
            self.file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.__exit__(*error)

        def write(self, data: bytes) -> None:
            full(data)

    if function == "write":
        monkeypatch.setattr(files, "open", Full, raising=False)
    else:
        monkeypatch.setattr(files.os, function, full)
    with pytest.raises(OSError, match="No space left"):
        Policy({}, target="cpu").save(path)
    monkeypatch.undo()
    assert path.read_bytes() == old
    assert only(path.parent) == ["policy.json"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_leaves_the_old_file(
    path: Path, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise error

    monkeypatch.setattr(files.os, "replace", interrupt)
    with pytest.raises(error):
        example().save(path)
    assert only(path.parent) == []


def test_what_json_has_no_number_for_is_refused_before_anything_is_written(path: Path) -> None:
    layer = LayerPolicy((NONE,), (EXACT,), seconds={EXACT: float("nan")})
    with pytest.raises(ValueError):
        Policy({"a#0": layer}, target="cpu").save(path)
    assert only(path.parent) == []


@pytest.mark.parametrize("target", ["nowhere/policy.json", "."])
def test_places_that_cannot_be_written(tmp_path: Path, target: str) -> None:
    with pytest.raises(OSError):
        example().save(tmp_path / target)
    assert only(tmp_path) == []


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_have_the_permissions_that_new_files_have(path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        example().save(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


# --- hostile files --------------------------------------------------------------------------


def parse_or_refuse(text: bytes) -> Policy | None:
    """A policy that is as good as any, or PolicyError; whatever else is raised fails the test."""
    try:
        policy = Policy.from_dict(policy_json.parse_json(text))
    except PolicyError as error:
        assert str(error)
        return None
    use(policy)
    return policy


def use(policy: Policy) -> None:
    """What anybody does with a policy."""
    assert str(policy).encode() and repr(policy)
    assert policy.diff(policy) == []
    again = json.dumps(policy.to_dict(), ensure_ascii=False, allow_nan=False)
    assert Policy.from_dict(policy_json.parse_json(again.encode())) == policy


def test_every_truncation_is_refused(path: Path) -> None:
    example().save(path)
    text = path.read_bytes().rstrip()
    for end in range(len(text)):
        assert parse_or_refuse(text[:end]) is None, end


def test_random_damage_never_raises_anything_else(path: Path) -> None:
    example().save(path)
    text = path.read_bytes()
    chance = random.Random(0)
    loaded = 0
    for _ in range(4000):
        damaged = bytearray(text)
        for _ in range(chance.choice((1, 1, 1, 2, 8))):
            at = chance.randrange(len(damaged))
            match chance.randrange(4):
                case 0:
                    damaged[at] ^= 1 << chance.randrange(8)
                case 1:
                    damaged[at] = chance.choice(b'0123456789-.eE"\\{}[],:u \n\x00\xff')
                case 2:
                    del damaged[at : at + chance.randrange(1, 40)]
                case _:
                    start = chance.randrange(len(text))
                    damaged[at:at] = text[start : start + chance.randrange(1, 40)]
        loaded += parse_or_refuse(bytes(damaged)) is not None
    assert 200 < loaded < 3800  # damage that hits, and damage that does not


RAW: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "not JSON"),
    "no text": (b"\xff\xfe\x00", "not JSON"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "not JSON"),
    "a list": (b"[]", "the file is a list; it must be an object"),
    "null": (b"null", "the file is null"),
    "a number": (b"1e999", "the file is inf"),
    "NaN": (b'{"version": NaN}', "NaN is not a number of JSON"),
    "Infinity": (b'{"version": -Infinity}', "-Infinity is not a number of JSON"),
    "a key twice": (b'{"a": 1, "a": 1}', "the key 'a' is there twice"),
    "deep lists": (b"[" * 1_000_000, "not JSON"),
    "deep objects": (b'{"a":' * 1_000_000, "not JSON"),
    "deep and closed": (b"[" * 100_000 + b"]" * 100_000, "not JSON"),
    "a number of many digits": (b'{"version": ' + b"9" * 100_000 + b"}", "not JSON"),
    "half of a surrogate pair": (b'{"format": "\\ud800"}', "not JSON"),
    "half of a pair in a key": (b'{"\\udfff": 1}', "not JSON"),
    "an empty object": (b"{}", "format is missing"),
    "two documents": (b"{} {}", "not JSON"),
    "a pickle": (pickle.dumps({"format": "sage-compiler policy"}), "not JSON"),
    "Python": (b"__import__('os').system('false')", "not JSON"),
}


@pytest.mark.parametrize("name", RAW)
def test_what_is_no_policy_is_refused(path: Path, name: str) -> None:
    text, words = RAW[name]
    path.write_bytes(text)
    with pytest.raises(PolicyError) as error:
        Policy.load(path)
    assert words in str(error.value)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 500


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("exploded",))


def test_a_pickle_is_not_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    path.write_bytes(pickle.dumps(Bomb(), protocol=0))
    with pytest.raises(PolicyError, match="not JSON"):
        Policy.load(path)
    assert only(path.parent) == ["policy.json"]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for name, words in (
        ("missing.json", "No such file"),
        (".", "directory"),
        ("a\0b", "null byte"),
        ("x" * 5000, "too long"),
    ):
        with pytest.raises(PolicyError, match=words):
            Policy.load(tmp_path / name)


def test_devices_without_an_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_json, "MOST_BYTES", 1000)
    with pytest.raises(PolicyError, match="larger than 1000 bytes"):
        Policy.load("/dev/zero")


@pytest.mark.parametrize("extra, refused", [(0, False), (1, True)])
def test_files_have_a_greatest_size(
    path: Path, extra: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    example().save(path)
    monkeypatch.setattr(policy_json, "MOST_BYTES", path.stat().st_size - extra)
    if refused:
        with pytest.raises(PolicyError, match="larger than"):
            Policy.load(path)
    else:
        assert Policy.load(path) == example()


def places(data: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value of plain data."""
    yield at
    if isinstance(data, (dict, list)):
        for key in data if isinstance(data, dict) else range(len(data)):
            yield from places(data[key], (*at, key))


def replaced(data: Any, at: tuple[Any, ...], value: object) -> Any:
    """A copy with another value at this path."""
    if not at:
        return value
    changed = copy.copy(data)
    if len(at) == 1:
        changed[at[0]] = value
    else:
        changed[at[0]] = replaced(data[at[0]], at[1:], value)
    return changed


ANYTHING = (
    *(None, True, False, -1, 0, 1, 10**4000, -(10**4000), 1.5, -0.0, 1e308),
    *("", "x" * 10_000, "int8_int8", [], ["x"], [[]], [{}], [None], {}, {"x": 1}, {"x": {}}),
)


def test_wrong_values_everywhere_are_refused_or_harmless(data: Any) -> None:
    outcomes = [
        parse_or_refuse(json.dumps(replaced(data, at, value)).encode()) is not None
        for at in places(data)
        for value in ANYTHING
    ]
    assert 0.05 < sum(outcomes) / len(outcomes) < 0.5


LAYER = ("layers", "blocks.0.attn#0")
ERRORS = (*LAYER, "measured", 0, "int8_int8")


@pytest.mark.parametrize(
    "at", [(), LAYER, ERRORS, ("calibration",), ("calibration", "end_to_end")], ids=str
)
def test_unknown_members_are_refused(path: Path, data: Any, at: tuple[Any, ...]) -> None:
    with pytest.raises(PolicyError, match=r"surprise is unknown; known there: "):
        Policy.load(write(path, replaced(data, (*at, "surprise"), 1)))


@pytest.mark.parametrize(
    "at, value, words",
    [
        (("format",), "a policy", "this is 'a policy' version 1; this release reads"),
        (("version",), 2, "'sage-compiler policy' version 2; this release reads"),
        (("version",), 1.0, "version is 1.0; it must be an integer"),
        (("version",), True, "version is True; it must be an integer"),
        (("target",), 3, "target is 3; it must be a string"),
        (("timestep_ranges",), 0, "0 timestep ranges; possible: 1 to 1000"),
        (("timestep_ranges",), 1001, "1001 timestep ranges; possible: 1 to 1000"),
        (("timestep_ranges",), -3, "timestep_ranges is -3; it must be at least 0"),
        (("timestep_ranges",), 3, "has 2 recipes; it needs one, or one for each of the 3"),
        (("timestep_ranges",), 10**4000, "timestep_ranges is a number beyond all bounds"),
        (("layers",), [], "layers is a list; it must be an object"),
        (LAYER, None, "layers.blocks.0.attn#0 is null; it must be an object"),
        ((*LAYER, "recipe"), "int9", "layer 'blocks.0.attn#0' has recipe 'int9'; known: exact, "),
        ((*LAYER, "recipe"), "auto", "has recipe 'auto'; known: exact, "),
        ((*LAYER, "recipe"), [], "recipe is a list; it must be a string or a list of strings"),
        ((*LAYER, "recipe"), [1], "recipe holds 1; it must hold strings"),
        ((*LAYER, "recipe"), ["exact"] * 3, "has 3 recipes; it needs one, or one for each"),
        ((*LAYER, "fingerprints"), [], "layer 'blocks.0.attn#0' has no fingerprint"),
        ((*LAYER, "fingerprints"), NONE, "fingerprints is 'q4 kv4 d64 dv64 none'; it must be a"),
        ((*LAYER, "measured"), [{}], "has errors of 1 timestep ranges; it needs those of 2"),
        ((*LAYER, "measured", 0), {"int9": {}}, "int9.cosine is missing"),
        ((*ERRORS, "cosine"), None, "cosine is null; it must be a finite number"),
        ((*ERRORS, "rel_l1"), "0.1", "rel_l1 is '0.1'; it must be a finite number"),
        ((*ERRORS, "calls"), 10**4000, "calls is a number beyond all bounds"),
        ((*LAYER, "seconds"), {"exact": True}, "seconds.exact is True; it must be a finite number"),
        ((*LAYER, "seconds"), {"exact": 10**400}, "seconds.exact is a number beyond all bounds"),
        (("calibration", "interrupted"), 1, "interrupted is 1; it must be true or false"),
        (("calibration", "budget"), {"speed": 1}, "the budget has 'speed'; known: cosine, rel_l1"),
        (("calibration", "budget"), {"__class__": 1}, "the budget has '__class__'; known: cosine"),
        (("calibration", "versions"), {"torch": 2}, "versions holds 2; it must hold strings"),
        (("calibration", "end_to_end"), 1, "calibration.end_to_end is 1; it must be an object"),
    ],
    ids=lambda value: str(value[-1] if isinstance(value, tuple) and value else value)[:40],
)
def test_complaints_say_what_is_wrong_and_where(
    path: Path, data: Any, at: tuple[Any, ...], value: object, words: str
) -> None:
    with pytest.raises(PolicyError) as error:
        Policy.load(write(path, replaced(data, at, value)))
    assert words in str(error.value)
    assert len(str(error.value)) < 500


def test_what_may_be_missing(path: Path) -> None:
    layer = {"fingerprints": [NONE], "recipe": "int8_int8"}
    whole = {"format": "sage-compiler policy", "version": 1, "target": "cpu", "timestep_ranges": 1}
    loaded = Policy.load(write(path, {**whole, "layers": {"a#0": layer}}))
    assert loaded == Policy({"a#0": LayerPolicy((NONE,), ("int8_int8",))}, target="cpu")


# --- does it fit ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer, fingerprint, words",
    [
        ("blocks.0.attn#0", NONE, None),
        ("blocks.1.attn#0", CAUSAL, None),
        ("blocks.0.attn#0", CAUSAL, f"blocks.0.attn#0 is {CAUSAL}; in the policy it is {NONE}"),
        (
            "blocks.1.attn#0",
            "q1 kv1 d8 dv8 none",
            f"blocks.1.attn#0 is q1 kv1 d8 dv8 none; in the policy it is {NONE} or {CAUSAL}",
        ),
        (
            "blocks.2.attn#1",
            NONE,
            f"blocks.2.attn#1 ({NONE}) is not in the policy; close to it is 'blocks.2.attn#0'",
        ),
        ("zzz", NONE, f"zzz ({NONE}) is not in the policy"),
    ],
)
def test_difference_of_a_layer(layer: str, fingerprint: str, words: str | None) -> None:
    assert example().difference(layer, fingerprint) == words


def test_differences_of_a_model_are_all_of_them_in_order() -> None:
    found = example().differences(
        [("zzz", NONE), ("blocks.2.attn#0", CAUSAL), ("blocks.1.attn#0", "other")]
    )
    assert found == [
        f"zzz ({NONE}) is not in the policy",
        f"blocks.1.attn#0 is other; in the policy it is {NONE} or {CAUSAL}",
        "blocks.0.attn#0 is in the policy, and not in the model",
    ]
    own = [(name, layer.fingerprints[0]) for name, layer in example().layers.items()]
    assert example().differences(own) == []


def test_require_lists_every_difference() -> None:
    example().require([])
    with pytest.raises(PolicyError) as error:
        example().require(["one", "two"])
    assert str(error.value) == (
        "the policy does not fit this model, 2 differences:\n  - one\n  - two\n"
        "calibrate this model, or apply what fits with the option strict_policy=False"
    )
    with pytest.raises(PolicyError, match=r"1 difference:\n  - one\n"):
        example().require(["one"])


# --- two policies ---------------------------------------------------------------------------


def test_diff_of_two_policies() -> None:
    def layer(*recipes: str, fingerprint: str = NONE, reason: str = "") -> LayerPolicy:
        return LayerPolicy((fingerprint,), recipes, reason)

    same = {"same#0": layer(EXACT)}
    before = Policy(
        {**same, "a#0": layer("int8_int8"), "b#0": layer(EXACT), "gone#0": layer(EXACT)},
        target="cpu",
    )
    after = Policy(
        {
            **same,
            "a#0": layer("int8_int8", EXACT, reason="too far off late"),
            "b#0": layer(EXACT, fingerprint=CAUSAL),
            "new#0": layer("int4_fp8"),
        },
        target="sm_89",
        timestep_ranges=2,
    )
    assert before.diff(before) == []
    assert before.diff(after) == [
        "target: cpu -> sm_89",
        "timestep_ranges: 1 -> 2",
        "a#0: int8_int8 -> int8_int8/exact (too far off late)",
        f"b#0: fingerprint {NONE} -> {CAUSAL}",
        "- gone#0: exact",
        "+ new#0: int4_fp8",
    ]
    assert len(after.diff(before)) == 6


def test_equality() -> None:
    assert example() == example()
    assert example() != Policy({}, target="cpu")
    assert example() != "a policy"
    with pytest.raises(TypeError, match="unhashable"):
        hash(example())


# --- layers, times and text -----------------------------------------------------------------


def test_a_policy_cannot_be_made_of_what_no_layer_can_have() -> None:
    for arguments in (
        {"layers": {"a#0": LayerPolicy((NONE,), ("auto",))}},
        {"layers": {"a#0": LayerPolicy((NONE,), ())}},
        {"layers": {"a#0": LayerPolicy((), (EXACT,))}},
        {"layers": {}, "timestep_ranges": MOST_RANGES + 1},
        {"layers": {"a#0": LayerPolicy((NONE,), (EXACT,) * 3)}, "timestep_ranges": 2},
        {"layers": {"a#0": LayerPolicy((NONE,), (EXACT,), measured=({}, {}))}},
    ):
        with pytest.raises(PolicyError):
            Policy(**arguments, target="cpu")


def test_recipe_errors_and_time_of_a_layer() -> None:
    first, second, third = example().layers.values()
    assert (first.recipe, second.recipe, third.recipe) == ("int8_int8/exact", "int4_fp8", EXACT)
    assert LayerPolicy((NONE,), (EXACT, EXACT)).recipe == EXACT
    # The first is exact in the second range, whose errors are of a recipe that it does not use.
    assert first.errors == errors()
    assert second.errors == errors().join(errors(0.99, float("inf")))
    assert third.errors is None
    assert first.predicted_seconds == pytest.approx(1.5e-3)
    assert second.predicted_seconds == 1e-3
    assert LayerPolicy((NONE,), ("int8_int8",), seconds={EXACT: 1.0}).predicted_seconds is None


def test_attention_seconds() -> None:
    policy = example()
    assert policy.attention_seconds == (pytest.approx(7e-3), pytest.approx(3.5e-3))
    policy.layers["x#0"] = LayerPolicy((NONE,), (EXACT,))
    assert policy.attention_seconds is None
    assert Policy({}, target="cpu").attention_seconds is None


def test_text_with_measurements() -> None:
    assert (
        str(example())
        == """\
policy for sm_89: 3 layers, 2 timestep ranges
  layer            recipe           cosine    rel_l1  time    exact  reason
  blocks.0.attn#0  int8_int8/exact  0.999000  0.0300  1.5 ms  2 ms   the cheapest within the budget
  blocks.1.attn#0  int4_fp8         0.990000  inf     1 ms    4 ms   größer als \u4e00 \U0001f600
  blocks.2.attn#0  exact                              1 ms    1 ms
attention of one input: 7 ms exact, 3.5 ms by the policy, 2.00 times as fast; timed on this machine
the whole model, one input: 200 ms exact, 100 ms policy
output_rel_l1: holds: 0.007 of at most 0.008 (0.01 with margin 0.8)
interrupted after 3 inputs"""
    )
    assert repr(example()) == "Policy(3 layers, target='sm_89')"


def test_text_without_measurements() -> None:
    policy = Policy({"a#0": LayerPolicy((NONE,), ("int8_int8",))}, target="cpu")
    assert str(policy) == (
        "policy for cpu: 1 layer\n"
        "  layer  recipe     cosine  rel_l1  time  exact  reason\n"
        "  a#0    int8_int8"
    )
    assert str(Policy({}, target="cpu")).startswith("policy for cpu: 0 layers\n")


@pytest.mark.parametrize(
    "worst, holds, words",
    [
        (0.007, True, "f: holds: 0.007 of at most 0.008 (0.01 with margin 0.8)"),
        (0.009, False, "f: does NOT hold: 0.009 of at most 0.008 (0.01 with margin 0.8)"),
        (None, False, "f: not verified; at most 0.008 (0.01 with margin 0.8) was asked for"),
    ],
)
def test_text_of_a_bound_on_the_output(worst: float | None, holds: bool, words: str) -> None:
    assert str(EndToEnd("f", 0.01, 0.8, worst, holds, 2)) == words


@pytest.mark.parametrize("text", ["\x1b[31mred", "two\nlines", "\u202emirrored"])
@pytest.mark.parametrize("place", ["layer", "reason", "target", "version"])
def test_text_that_would_steer_a_terminal_is_refused(text: str, place: str) -> None:
    data = example().to_dict()
    if place == "layer":
        data["layers"][text] = data["layers"].popitem()[1]
    elif place == "reason":
        next(iter(data["layers"].values()))["reason"] = text
    elif place == "target":
        data["target"] = text
    else:
        data["calibration"]["versions"] = {"torch": text}
    with pytest.raises(PolicyError, match="must be printable text") as error:
        Policy.from_dict(data)
    assert str(error.value).isprintable()
