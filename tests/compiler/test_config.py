"""Options are checked at the edge, with errors that list what is known."""

from typing import Any

import pytest

from sage_compiler.config import KNOWN, Fallback, Options, parse_options
from sage_compiler.errors import InvalidOptionError
from sage_compiler.guard import Action, Guard
from sage_compiler.policy import LayerPolicy, Policy


def test_nothing_given_is_the_default() -> None:
    assert parse_options(None) == parse_options({}) == Options()


def test_every_option_is_read() -> None:
    layer = LayerPolicy(("q4 kv4 d16 dv16 none",), ("int8_int8",))
    policy = Policy({"layers.0#0": layer}, target="cpu")
    parsed = parse_options(
        {
            "precision": "auto",
            "policy": policy,
            "strict_policy": False,
            "guard": {"fraction": 0.5, "cosine": 0.99, "action": "demote"},
            "min_seq_len": 7,
            "fallback": "sdpa",
            "inductor": {"max_autotune": True},
            "mode": "max-autotune-no-cudagraphs",
        }
    )
    assert parsed == Options(
        precision="auto",
        policy=policy,
        strict_policy=False,
        guard=Guard(0.5, {"cosine": 0.99}, Action.DEMOTE),
        min_seq_len=7,
        fallback=Fallback.SDPA,
        inductor={"max_autotune": True},
        mode="max-autotune-no-cudagraphs",
    )


def test_unknown_options_list_the_known_ones() -> None:
    with pytest.raises(InvalidOptionError) as error:
        parse_options({"precison": "exact", "zz": 1})
    assert "'precison', 'zz'" in str(error.value)
    assert all(name in str(error.value) for name in KNOWN)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"precision": "int3_fp8"}, ["'int3_fp8'", "int8_fp8", "exact", "auto"]),
        ({"precision": None}, ["None", "known"]),
        ({"min_seq_len": -1}, ["-1", "at least 0"]),
        ({"min_seq_len": 1.5}, ["1.5", "integer"]),
        ({"min_seq_len": True}, ["True", "integer"]),
        ({"min_seq_len": 64, "precision": "int8_fp8"}, ["64", "'int8_fp8'", "auto"]),
        ({"fallback": "eager"}, ["'eager'", "emulate, sdpa, error"]),
        ({"fallback": ["sdpa"]}, ["sdpa", "emulate"]),
        ({"inductor": "max_autotune"}, ["'max_autotune'", "dict"]),
        ({"inductor": {1: 2}}, ["dict"]),
        ({"mode": 3}, ["3", "mode"]),
    ],
    ids=str,
)
def test_bad_values_say_what_is_possible(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InvalidOptionError) as error:
        parse_options(options)
    assert all(word in str(error.value) for word in words)


def test_an_open_gate_goes_with_every_precision() -> None:
    assert parse_options({"min_seq_len": 0, "precision": "int8_fp8"}).min_seq_len == 0


def test_mode_has_two_spellings_that_must_agree() -> None:
    assert parse_options(None, "max-autotune").mode == "max-autotune"
    assert parse_options({"mode": "max-autotune"}, "max-autotune").mode == "max-autotune"
    with pytest.raises(InvalidOptionError, match="give one"):
        parse_options({"mode": "default"}, "max-autotune")


GUARD = {"guard": {"cosine": 0.99}}
BY_STEP = {"policy": Policy({}, target="cpu", timestep_ranges=2)}
FIXED = {"policy": Policy({}, target="cpu")}
GRAPHS = {"inductor": {"triton.cudagraphs": True}}


@pytest.mark.parametrize(
    "options, words",
    [
        ({**GUARD, "mode": "reduce-overhead"}, ["guard with mode='reduce-overhead'"]),
        ({**GUARD, "mode": "max-autotune"}, ["mode='max-autotune'", "max-autotune-no-cudagraphs"]),
        ({**GUARD, **GRAPHS}, ["guard with triton.cudagraphs", "mode='default'"]),
        ({**BY_STEP, "mode": "reduce-overhead"}, ["timestep ranges with mode='reduce-overhead'"]),
        ({**BY_STEP, **GRAPHS}, ["timestep ranges with triton.cudagraphs"]),
        ({**BY_STEP, "inductor": {"freezing": True}}, ["timestep ranges with inductor freezing"]),
    ],
    ids=str,
)
def test_options_that_undo_each_other_are_refused(
    options: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(InvalidOptionError) as error:
        parse_options(options)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    "options",
    [
        {**GUARD, "mode": "default"},
        {**GUARD, "mode": "max-autotune-no-cudagraphs"},
        {**GUARD, "inductor": {"triton.cudagraphs": False, "freezing": True}},
        {**BY_STEP, "mode": "max-autotune-no-cudagraphs", "inductor": {"freezing": False}},
        {**FIXED, "mode": "reduce-overhead", "inductor": {"freezing": True}},
        {"mode": "reduce-overhead", **GRAPHS},
    ],
    ids=str,
)
def test_options_that_go_together(options: dict[str, Any]) -> None:
    parse_options(options)


def test_the_mode_argument_is_refused_like_the_option() -> None:
    with pytest.raises(InvalidOptionError, match="guard with mode='reduce-overhead'"):
        parse_options(GUARD, "reduce-overhead")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"policy": 3}, "policy=3; it must be a sage.Policy or the path of one"),
        ({"policy": b"policy.json"}, "it must be a sage.Policy or the path of one"),
        ({**FIXED, "precision": "int8_int8"}, "a policy with precision='int8_int8'"),
        ({**FIXED, "precision": "exact"}, "a policy with precision='exact'"),
        ({"strict_policy": 1}, "strict_policy=1; it must be True or False"),
        ({**GUARD, "precision": "exact"}, "guard with precision='exact'"),
    ],
    ids=str,
)
def test_bad_policies_and_guards(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidOptionError) as error:
        parse_options(options)
    assert words in str(error.value)
