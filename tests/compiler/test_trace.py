"""What TORCH_TRACE records of a compilation: the report, and the graphs as code."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PROGRAM = """
import torch, torch.nn.functional as F

def attend(x):
    return F.scaled_dot_product_attention(x, x, x) + 1

torch.compile(attend, backend="sage", options={"precision": "exact"})(torch.randn(1, 2, 16, 8))
"""


def artifacts(log: Path) -> list[tuple[dict[str, Any], str]]:
    """Each record of a log with its payload, whose lines begin with a tab."""
    found: list[tuple[dict[str, Any], str]] = []
    for line in log.read_text().splitlines():
        if line.startswith("\t"):
            record, payload = found[-1]
            found[-1] = (record, f"{payload}{line[1:]}\n")
        elif "{" in line:
            found.append((json.loads(line[line.index("{") :]), ""))
    return [(record["artifact"], payload) for record, payload in found if "artifact" in record]


def test_the_trace_holds_the_report_and_both_graphs_as_code(tmp_path: Path) -> None:
    script = tmp_path / "attend.py"  # a file, so that there are lines to name
    script.write_text(PROGRAM)
    environment = os.environ | {"TORCH_TRACE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, script], check=True, env=environment, cwd=tmp_path)
    (log,) = tmp_path.glob("*.log")
    ours = [each for each in artifacts(log) if each[0]["name"].startswith("sage_")]
    assert [(artifact["name"], artifact["encoding"]) for artifact, _ in ours] == [
        ("sage_report", "json"),
        ("sage_graph_before", "string"),
        ("sage_graph_after", "string"),
    ]
    report, before, after = (payload for _, payload in ours)
    assert json.loads(report)["rewritten"] == 1
    assert "scaled_dot_product_attention(" in before and "sage.attention" not in before
    assert "torch.ops.sage.attention.default(" in after
    assert "f32[1, 2, 16, 8]" in after and "scaled_dot_product_attention(x, x, x) + 1" in after
