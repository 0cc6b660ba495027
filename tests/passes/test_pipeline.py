"""The passes as a whole: whole models, exported programs, decisions."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, fx, nn

from sage_compiler.errors import KernelUnavailableError
from sage_compiler.passes import pipeline
from sage_compiler.passes.normalize import operation
from sage_compiler.passes.pipeline import Decision
from sage_compiler.precision import EXACT
from sage_compiler.report import Report
from tests.capture import rewritten
from tests.passes.checks import captured, normal, same, sdpa


def exact(site: Any) -> Decision:
    return Decision(EXACT, "asked for")


# --- models ---------------------------------------------------------------------------------

TOKENS = torch.arange(5, 29).view(2, 12)
RIGHT_PADDED, LEFT_PADDED = torch.ones(2, 2, 12, dtype=torch.long)
RIGHT_PADDED[1, 8:] = 0
LEFT_PADDED[1, :4] = 0
PIXELS = normal(2, 3, 16, 16)
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 99,
    "attn_implementation": "sdpa",
    **SPECIAL,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
}


def gpt2() -> nn.Module:
    return hf.GPT2Model(
        hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=64, **SPECIAL)
    )


def llama() -> nn.Module:
    return hf.LlamaModel(hf.LlamaConfig(**TEXT, num_key_value_heads=2))


def mistral() -> nn.Module:
    return hf.MistralModel(hf.MistralConfig(**TEXT, num_key_value_heads=2, sliding_window=4))


def bert() -> nn.Module:
    return hf.BertModel(hf.BertConfig(**TEXT))


def clip() -> nn.Module:
    return hf.CLIPModel(
        hf.CLIPConfig(
            text_config={**TEXT, "max_position_embeddings": 16},
            vision_config=VISION,
            projection_dim=16,
        )
    )


def whisper() -> nn.Module:
    return hf.WhisperModel(
        hf.WhisperConfig(
            vocab_size=99,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=16,
            decoder_start_token_id=1,
            **SPECIAL,
        )
    )


def t5() -> nn.Module:
    return hf.T5Model(
        hf.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=99)
    )


def vit() -> nn.Module:
    return hf.ViTModel(hf.ViTConfig(**VISION))


# model, inputs, {(mask, heads) of its sites}, number of sites
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], set[tuple[str, str]], int]] = {
    "BERT": (bert, {"input_ids": TOKENS}, {("none", "4")}, 2),
    "BERT, padded": (
        bert,
        {"input_ids": TOKENS, "attention_mask": RIGHT_PADDED},
        {("explicit bool", "4")},
        2,
    ),
    "GPT2": (gpt2, {"input_ids": TOKENS}, {("causal", "4")}, 2),
    "GPT2 without a cache": (
        gpt2,
        {"input_ids": TOKENS, "use_cache": False},
        {("causal", "4")},
        2,
    ),
    "Llama": (llama, {"input_ids": TOKENS}, {("causal", "4 over 2")}, 2),
    "Llama, padded": (
        llama,
        {"input_ids": TOKENS, "attention_mask": LEFT_PADDED},
        {("causal and explicit bool", "4 over 2")},
        2,
    ),
    "Mistral": (
        mistral,
        {"input_ids": TOKENS, "use_cache": False},
        {("window (3, 0)", "4 over 2")},
        2,
    ),
    "ViT": (vit, {"pixel_values": PIXELS}, {("none", "4")}, 2),
    "CLIP": (
        clip,
        {"input_ids": TOKENS, "pixel_values": PIXELS, "attention_mask": RIGHT_PADDED},
        {("none", "4"), ("causal and explicit bool", "4")},
        4,
    ),
    "Whisper": (
        whisper,
        {"input_features": normal(2, 8, 32), "decoder_input_ids": TOKENS},
        {("none", "4"), ("causal", "4")},
        6,
    ),
    "T5": (
        t5,
        {"input_ids": TOKENS, "decoder_input_ids": TOKENS},
        {("none", "4"), ("explicit additive", "4")},
        6,
    ),
}


def kind_of(mask: str) -> str:
    """A mask's text; without the shape of an explicit one, which PyTorch's version decides."""
    parts = [
        part.partition(" (")[0] if part.startswith("explicit") else part
        for part in mask.split(" and ")
    ]
    return " and ".join(parts)


def accounts_for_every_attention(report: Report) -> None:
    """Each SDPA of the captured graphs is in the report, once."""
    attentions = sum(
        node.op == "call_function" and operation(node) == "scaled_dot_product_attention"
        for pair in report.graphs
        for node in pair.before.graph.nodes
    )
    assert attentions == len(report.sites)


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    build, inputs, masks, count = MODELS[name]
    torch.manual_seed(0)
    model = build().eval()

    def run() -> list[Tensor]:
        output = model(**inputs)
        names = ("last_hidden_state", "pooler_output", "text_embeds", "image_embeds")
        return [output[name] for name in names if output.get(name) is not None]

    with torch.no_grad():
        expected = run()
        actual, report = rewritten(run, precision=EXACT)
    assert expected
    same(actual, expected)
    accounts_for_every_attention(report)
    assert len(report.rewritten) == len(report.sites) == count
    assert {(kind_of(site.mask), site.heads) for site in report.rewritten} == masks
    assert len({site.layer for site in report.sites}) == count


def test_a_decoding_step_with_a_cache() -> None:
    torch.manual_seed(0)
    model = llama().eval()

    def step(cache: Any) -> Tensor:
        return model(input_ids=TOKENS[:, :1], past_key_values=cache).last_hidden_state

    with torch.no_grad():
        caches = [hf.DynamicCache(config=model.config) for _ in range(2)]
        for cache in caches:
            model(input_ids=TOKENS, past_key_values=cache)
        expected = step(caches[0])
        actual, report = rewritten(step, caches[1], precision=EXACT)
    same(actual, expected)
    for first, second in zip(*(cache.layers for cache in caches), strict=True):
        same((second.keys, second.values), (first.keys, first.values))
    accounts_for_every_attention(report)
    assert {(site.q_shape, site.kv_shape) for site in report.rewritten} == {
        ((2, 4, 1, 8), (2, 2, 13, 8))
    }


# --- exported programs ----------------------------------------------------------------------

L, D = 6, 8
X = normal(2, 4, L, D)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(D, D)
        self.register_buffer("mask", torch.ones(L, L, dtype=torch.bool).tril())

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(x)
        x = sdpa(x, x, x, is_causal=True)
        x = sdpa(x, x, x, attn_mask=self.mask)
        k = x[:, :1].repeat_interleave(4, dim=1)
        mask = torch.ones(L, L, dtype=torch.bool).tril()
        x = sdpa(x, k, k, attn_mask=mask, scale=0.3)
        return x + sdpa(x, x, x, dropout_p=0.0)


class Exported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


LAYERS = [f"blocks.{block}#{ordinal}" for block in (0, 1) for ordinal in range(4)]
MASKS = ["causal", "explicit bool (6, 6)", "causal", "none"] * 2


def export(strict: bool = False, **options: Any) -> tuple[nn.Module, torch.export.ExportedProgram]:
    torch.manual_seed(0)
    model = Exported().eval()
    return model, torch.export.export(model, (X,), strict=strict, **options)


def check_exported(gm: fx.GraphModule, model: nn.Module, *inputs: Tensor) -> None:
    outcome = pipeline.run(gm, exact)
    assert [finding.layer for finding, _ in outcome.findings] == LAYERS
    assert [finding.mask.text for finding, _ in outcome.findings] == MASKS
    assert all(__file__ in finding.source for finding, _ in outcome.findings)
    gm.recompile()
    same(gm(*inputs), model(*inputs))
    assert sum(operation(node) == "sage::attention" for node in gm.graph.nodes) == 8


@pytest.mark.parametrize("strict", [False, True])
def test_the_module_of_an_export(strict: bool) -> None:
    model, program = export(strict)
    check_exported(program.module(), model, X)


def test_an_export_without_decompositions() -> None:
    model, program = export()
    check_exported(program.run_decompositions({}).module(), model, X)


def test_a_saved_export() -> None:
    model, program = export()
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    check_exported(torch.export.load(file).module(), model, X)


def test_an_export_with_a_symbolic_batch() -> None:
    model, program = export(dynamic_shapes=({0: torch.export.Dim("batch")},))
    check_exported(program.module(), model, normal(5, 4, L, D))


def test_the_graph_module_of_an_export() -> None:
    model, program = export()
    gm = copy.deepcopy(program.graph_module)
    outcome = pipeline.run(gm, exact)
    assert [finding.layer for finding, _ in outcome.findings] == LAYERS
    gm.recompile()
    named = program.state_dict | program.constants
    lifted = [named[spec.target] for spec in program.graph_signature.input_specs if spec.target]
    same(gm(*lifted, X)[0], model(X))


def test_a_decomposed_export_is_kept_with_reasons() -> None:
    _, program = export()
    gm = program.run_decompositions().graph_module
    before = str(gm.graph)
    findings = pipeline.run(gm, exact).findings
    assert len(findings) == 8
    assert all(decision.recipe is None and decision.reason for _, decision in findings)
    assert str(gm.graph) == before


def test_a_compiled_export() -> None:
    model, program = export()
    actual, report = rewritten(program.module(), X, precision=EXACT)
    same(actual, model(X))
    assert [site.mask for site in report.rewritten] == MASKS


class Changing(nn.Module):
    """Masks that change through aliases which no schema announces."""

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = (torch.ones(L, L, dtype=torch.bool).tril() for _ in range(3))
        torch.einsum("ij->ji", first)[2].fill_(True)
        torch.broadcast_tensors(second, second)[1].fill_(True)
        torch.atleast_3d(third)[2].fill_(True)
        return sdpa(sdpa(sdpa(x, x, x, first), x, x, second), x, x, third)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("saved", [False, True])
def test_an_export_that_changes_a_constant(strict: bool, saved: bool) -> None:
    model = Changing()
    program = torch.export.export(model, (X,), strict=strict)
    if saved:
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        program = torch.export.load(file)
    gm = program.module()
    outcome = pipeline.run(gm, exact)
    assert [decision.recipe for _, decision in outcome.findings] == [EXACT] * 3
    gm.recompile()
    same(gm(X), model(X))


# --- decisions ------------------------------------------------------------------------------


def three(q: Tensor) -> Tensor:
    return sdpa(sdpa(sdpa(q, q, q, dropout_p=0.5), q, q), q, q, is_causal=True)


def test_findings_are_in_graph_order_with_their_decisions() -> None:
    gm = captured(three, X)

    def decide(site: Any) -> Decision:
        causal = site.mask.text == "causal"
        return Decision(EXACT, "causal") if causal else Decision(None, "not causal")

    outcome = pipeline.run(gm, decide)
    assert [finding.layer for finding, _ in outcome.findings] == [f"(root)#{i}" for i in range(3)]
    assert [(d.recipe, d.reason.partition(":")[0]) for _, d in outcome.findings] == [
        (None, "dropout_p=0.5"),
        (None, "not causal"),
        (EXACT, "causal"),
    ]
    assert sum(operation(node) == "sage::attention" for node in gm.graph.nodes) == 1
    assert sum(operation(node) == "sage::attention" for node in outcome.before.build().nodes) == 0


def test_a_refusal_leaves_the_graph_alone() -> None:
    gm = captured(three, X)
    before, graph = str(gm.graph), gm.graph

    def refuse(site: Any) -> Decision:
        raise KernelUnavailableError("nobody serves this")

    with pytest.raises(KernelUnavailableError, match="nobody"):
        pipeline.run(gm, refuse)
    assert gm.graph is graph and str(graph) == before


def test_a_graph_where_all_is_kept_is_not_touched() -> None:
    gm = captured(three, X)
    before, graph = str(gm.graph), gm.graph
    outcome = pipeline.run(gm, lambda site: Decision(None, "no"))
    assert gm.graph is graph and str(graph) == before
    assert {decision.recipe for _, decision in outcome.findings} == {None}


def test_a_graph_without_attention() -> None:
    gm = captured(lambda q: q + 1, X)
    assert pipeline.run(gm, exact).findings == []


def test_running_twice_finds_the_operator() -> None:
    gm = captured(lambda q: sdpa(q, q, q), X)
    pipeline.run(gm, exact)
    ((finding, decision),) = pipeline.run(gm, exact).findings
    assert finding.form == "sage::attention"
    assert decision.recipe is None
