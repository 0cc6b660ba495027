"""From a spec to its source, and the digest of the templates."""

import itertools
from dataclasses import replace
from pathlib import Path

from sage_compiler.kernels.cuda.render import INCLUDE, render, templates_digest
from sage_compiler.kernels.cuda.spec import (
    KernelSpec,
    KeySpec,
    QuerySpec,
    StatisticsSpec,
    ValueSpec,
)
from sage_compiler.kernels.cuda.variants import variant
from sage_compiler.precision import Accumulator, Format
from tests.compiler.kernels.cuda.toy import ToySpec

ATTEND = variant("sm_89", "float16", 64, "int8_fp8").attend
SPECS: list[KernelSpec] = [
    StatisticsSpec("sm_89", "float16", 64, 64),
    QuerySpec("sm_89", "float16", 64, Format.INT8),
    KeySpec("sm_89", "float16", 64, Format.INT4),
    ValueSpec("sm_89", "bfloat16", 128, Format.FP8),
    ATTEND,
    replace(ATTEND, accumulator=Accumulator.FP16),
    replace(ATTEND, stages=2),
    replace(ATTEND, warp_rows=16),
    replace(ATTEND, window=True),
    replace(ATTEND, masked=True),
    replace(ATTEND, softcap=True),
]


def test_the_source_instantiates_the_template() -> None:
    spec = ToySpec("sm_80", "float16", 64, bytes=1024)
    assert render(spec).splitlines()[1:] == [
        "#include <sage/toy.cuh>",
        "",
        "SAGE_KERNEL(sage_toy_sm_80_float16_64_1024, 64, 1024, 24,",
        "            sage::Toy<64, 1024>)",
    ]


def test_every_spec_has_a_source_of_its_own_over_a_template_that_is_there() -> None:
    for spec in SPECS:
        assert (INCLUDE / "sage" / f"{spec.kind}.cuh").is_file()
        assert f"SAGE_KERNEL({spec.symbol}, {spec.threads}, {spec.shared_bytes}" in render(spec)
    for one, other in itertools.combinations(SPECS, 2):
        assert one.symbol != other.symbol
        assert render(one) != render(other)


def test_the_architecture_is_part_of_the_source() -> None:
    assert render(replace(SPECS[0], arch="sm_80")) != render(SPECS[0])


def folder(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def test_the_digest_is_over_names_and_contents(tmp_path: Path) -> None:
    contents = [
        {"sage/a.cuh": "xy", "sage/b.cuh": ""},
        {"sage/a.cuh": "x", "sage/b.cuh": "y"},
        {"sage/a.cuh": "xsage/b.cuhy"},
        {"sage/a.cuh": "xy", "sage/c.cuh": ""},
        {"sage/a.cuh": "xz", "sage/b.cuh": ""},
        {"sage/a.cuh": "xy"},
        {"sage/deep/a.cuh": "xy", "sage/b.cuh": ""},
    ]
    folders = [folder(tmp_path / str(i), files) for i, files in enumerate(contents)]
    digests = [templates_digest(path) for path in folders]
    assert len(set(digests)) == len(digests)
    same = folder(tmp_path / "same", dict(reversed(contents[0].items())))
    assert templates_digest(same) == digests[0]
