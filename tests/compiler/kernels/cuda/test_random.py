"""Random calls of the operator on the CPU-executed CUDA kernels: see ``random_calls``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from torch import Tensor

from sage_compiler.kernels.cuda import kernel
from sage_compiler.kernels.cuda.driver import DriverError
from sage_compiler.kernels.cuda.loader import Loader
from sage_compiler.kernels.cuda.spec import DTYPES, HEAD_DIMS
from tests.compiler.kernels.cuda.emulation import WGMMA, Way, broken, replacing
from tests.compiler.kernels.cuda.random_calls import (
    CALLS,
    TEMPLATES,
    WAYS,
    Form,
    assert_right,
    random_call,
    templates,
)
from tests.cutlass_templates import host

pytestmark = pytest.mark.skipif(host.missing() is not None, reason=str(host.missing()))

RUN = 0  # that of continuous integration
FURTHER_RUNS = range(1, 21)


@pytest.mark.parametrize("template", range(TEMPLATES))
def test_random_calls(template: int) -> None:
    for call in range(CALLS):
        assert_right(random_call(RUN, call * TEMPLATES + template))


@pytest.mark.slow
@pytest.mark.parametrize("run", FURTHER_RUNS)
@pytest.mark.parametrize("template", range(TEMPLATES))
def test_more_random_calls(template: int, run: int) -> None:
    for call in range(CALLS):
        assert_right(random_call(run, call * TEMPLATES + template))


def test_a_run_has_its_share_of_everything() -> None:
    assert TEMPLATES * CALLS >= 300
    for run in (RUN, *FURTHER_RUNS):
        chosen = templates(run)
        for values, least in (
            (Counter(each.way for each in chosen), len(WAYS)),
            (Counter(each.dtype for each in chosen), len(DTYPES)),
            (Counter(each.head_dim for each in chosen), len(HEAD_DIMS)),
        ):
            assert len(values) == least
            assert min(values.values()) >= TEMPLATES // 8
        assert all(sum(each.form is form for each in chosen) >= TEMPLATES // 8 for form in Form)
        for kind in ("window", "masked", "softcap"):
            assert sum(getattr(each, kind) for each in chosen) >= TEMPLATES // 4


def assert_found(
    loader: Loader | None = None, form: Form = Form.CALL, ways: Sequence[Way] = WAYS
) -> None:
    """One of the first calls of a form, by these kernels, fails, and says how it is repeated."""
    with pytest.raises((AssertionError, DriverError)) as found:
        for number in range(2 * TEMPLATES):
            template = templates(RUN)[number % TEMPLATES]
            if template.form is form and template.way in ways:
                assert_right(random_call(RUN, number), loader)
    assert f"cuda.random_calls {RUN} " in found.value.__notes__[-1]


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        ("attend", "? key : end;", "? key : end + 1;"),
        ("attend", "if (mixed) apply_mask(x, mask[band][half], band, half, tile);", ""),
        ("key", "key[t][i] - mean[i]", "key[t][i]"),
        ("value", "arch::barrier();", ""),
        # of few queries by wgmma alone: rows in the places of others, parts that overlap
        ("query", "place.token(t) * p.group + head.inner", "place.token(t) * p.group"),
        ("attend_hopper/hopper_task", "(part_ < share.inner ? part_ : share.inner)", "0"),
    ],
)
def test_a_broken_kernel_is_found(kind: str, old: str, new: str) -> None:
    ways = (WGMMA,) if kind in ("query", "attend_hopper/hopper_task") else WAYS
    kind, *headers = kind.split("/")
    assert_found(broken(kind, replacing(old, new), *headers), ways=ways)


@pytest.mark.parametrize(
    ("form", "kind", "old", "new"),
    [
        # every sequence's sums of K in the place of the first; V's scales by part of the tokens
        (Form.PACKED, "statistics", "p.key_sums += before * kKeyDim;", ""),
        (Form.CACHE, "append", "row < Value::At::kRows", "row < 1"),
    ],
)
def test_a_broken_form_is_found(form: Form, kind: str, old: str, new: str) -> None:
    assert_found(broken(kind, replacing(old, new)), form)


def test_lost_strides_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def dense(tensor: Tensor) -> tuple[int, ...]:
        return (tensor.data_ptr(), *tensor.contiguous().stride(), tensor.shape[3])

    monkeypatch.setattr(kernel, "strided", dense)
    assert_found()
