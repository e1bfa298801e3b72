"""The ops as PyTorch sees them: registration, export, compile, and what a user's mistake says."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from toprovar.errors import InputError
from toprovar.kernels import (
    contract,
    entropy_attention,
    gather_tokens,
    ops,
    restore_tokens,
    scatter_tokens,
    select_tokens,
)

TOP = torch.ops.toprovar


def test_contract_tuning_and_loader_need_neither_torch_nor_triton() -> None:
    code = (
        "import sys, toprovar.kernels.contract, toprovar.kernels.tuning, toprovar.kernels.aot, toprovar.kernels.loader;"
        "assert not {'torch', 'triton', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_op_of_the_contract_is_registered_with_its_tensors() -> None:
    assert set(ops._IMPLEMENTATIONS) == set(contract.OPS)
    for name, spec in contract.OPS.items():
        schema = getattr(TOP, name).default._schema
        tensors = [a.name for a in schema.arguments if str(a.type) == "Tensor"]
        assert tensors == [tensor.name for tensor in spec.inputs]
        assert [a.name for a in spec.attributes] == [a.name for a in schema.arguments if a.name not in tensors][
            : len(spec.attributes)
        ]


def arguments(dtype: torch.dtype = torch.float32) -> dict[str, tuple]:
    torch.manual_seed(0)
    q, new_k, new_v = (torch.randn(6, 2, 3, 8, dtype=dtype) for _ in range(3))
    past_k, past_v = (torch.randn(5, 2, 3, 8, dtype=dtype) for _ in range(2))
    x, kept, cache = (torch.randn(n, 2, 4, dtype=dtype) for n in (6, 3, 4))
    indices = torch.tensor([[0, 2, 5]], dtype=torch.int32)
    rows, cols = torch.full((3, 2), 0.5), torch.full((2, 2), 0.5)
    return {
        "entropy_attention": (q, past_k, past_v, new_k, new_v, 0.5, "mean", True),
        "select_tokens": (torch.rand(2, 6), torch.zeros(3, dtype=torch.int32)),
        "gather_tokens": (x, indices),
        "scatter_tokens": (x, kept, indices),
        "restore_tokens": (x, kept, indices, cache, rows, cols),
    }


@pytest.mark.parametrize("name", sorted(contract.OPS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_and_real_implementations_agree(name: str, dtype: torch.dtype) -> None:
    torch.library.opcheck(
        getattr(TOP, name).default, arguments(dtype)[name], test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("entropy", ["none", "mean", "head"])
@pytest.mark.parametrize("return_lse", [False, True])
def test_fake_attention_has_the_shape_of_every_option(entropy: str, return_lse: bool) -> None:
    tensors = arguments()["entropy_attention"][:5]
    torch.library.opcheck(
        TOP.entropy_attention.default,
        (*tensors, 0.5, entropy, return_lse),
        test_utils=("test_schema", "test_faketensor"),
    )


class Scale(torch.nn.Module):
    """What a step does with the ops."""

    def forward(self, q: Tensor, past: Tensor, keep_slots: Tensor, cache: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        found = entropy_attention(q, past, past, q, q, scale=0.5)
        assert found.entropy is not None
        x = found.out.flatten(2)
        indices = select_tokens(found.entropy[:1], keep_slots)
        kept = gather_tokens(x, indices) * 2
        return restore_tokens(x, kept, indices, cache, rows, cols) + scatter_tokens(x, kept, indices)


def scale_inputs(h: int, w: int, past: int, keep: int) -> tuple[Tensor, ...]:
    torch.manual_seed(h * w)
    q, p = torch.randn(h * w, 2, 3, 8), torch.randn(past, 2, 3, 8)
    return (
        q,
        p,
        torch.zeros(keep, dtype=torch.int32),
        torch.randn(4, 2, 24),
        torch.full((h, 2), 0.5),
        torch.full((w, 2), 0.5),
    )


def test_export_keeps_each_op_as_one_node_with_every_length_free() -> None:
    dims = {name: torch.export.Dim(name) for name in ("n", "p", "k")}
    # The grid's h and w would have to satisfy h * w = n, which export cannot state: rows of a 1 x n grid stand for it.
    inputs = scale_inputs(9, 1, 5, 4)
    shapes = ({0: dims["n"]}, {0: dims["p"]}, {0: dims["k"]}, None, {0: torch.export.Dim("h")}, None)
    program = torch.export.export(Scale(), inputs, dynamic_shapes=shapes)
    called = [str(node.target) for node in program.graph.nodes if str(node.target).startswith("toprovar.")]
    assert sorted(called) == sorted(f"toprovar.{name}.default" for name in contract.OPS)
    for sizes in ((9, 1, 5, 4), (20, 1, 0, 20), (2, 1, 70, 1)):
        torch.testing.assert_close(program.module()(*scale_inputs(*sizes)), Scale()(*scale_inputs(*sizes)))


def test_compile_has_no_graph_break() -> None:
    compiled = torch.compile(Scale(), fullgraph=True, backend="aot_eager", dynamic=True)
    for sizes in ((3, 2, 5, 4), (4, 4, 11, 16)):
        torch.testing.assert_close(compiled(*scale_inputs(*sizes)), Scale()(*scale_inputs(*sizes)))


def bad_calls() -> list[tuple[str, str]]:
    return [
        ("entropy_attention(q, k, k, [1], k, scale=1.0)", "new_k is a list"),
        ("entropy_attention(q[0], k, k, k, k, scale=1.0)", r"q has shape \[2, 3, 8\]; it must be \[N,R,H,D\]"),
        ("entropy_attention(q, k[:, :1], k, k, k, scale=1.0)", r"past_k has \[R,H,D\] = \[1, 3, 8\]"),
        ("entropy_attention(q, k[:2], k, k, k, scale=1.0)", "past_k holds 2 keys but past_v 5 values"),
        ("entropy_attention(q, k[:0], k[:0], k[:0], k[:0], scale=1.0)", "no key is given"),
        ("entropy_attention(q[:0], k, k, k, k, scale=1.0)", "no axis"),
        ("entropy_attention(q, k, k, k.half(), k, scale=1.0)", "new_k is float16 but q is float32"),
        ("entropy_attention(q.int(), k, k, k, k, scale=1.0)", "q is int32; it must be float16, bfloat16, float32"),
        ("entropy_attention(q, k, k, k, k, scale=0.0)", "finite number above 0"),
        ("entropy_attention(q, k, k, k, k, scale=float('nan'))", "finite number above 0"),
        ("entropy_attention(q, k, k, k, k, scale=1.0, entropy='max')", "one of 'none', 'mean', 'head'"),
        ("select_tokens(x[0], slots)", "valid is B >= 1, 1 <= K <= N"),
        ("select_tokens(x[0], slots[:0])", "K = 0"),
        ("select_tokens(x[0].half(), slots)", "entropy is float16; it must be float32"),
        ("gather_tokens(x, indices.long())", "indices is int64; it must be int32"),
        ("gather_tokens(x, indices.repeat(3, 1))", "R must be a multiple of B"),
        ("gather_tokens(x[:2], indices)", "K must not exceed N"),
        ("scatter_tokens(x, x, indices)", r"kept has \[K,R,C\] = \[6, 2, 4\]; indices and x asks for \[3, 2, 4\]"),
        ("restore_tokens(x, x[:3], indices, x[:4], rows, rows)", "grid of 3 x 3 = 9 tokens; x has N = 6"),
        ("restore_tokens(x, x[:3], indices, x[:3], rows, cols)", "the cached grid 2 x 2"),
        ("gather_tokens(x.to('meta'), indices)", "indices is on cpu but x is on meta"),
    ]


@pytest.mark.parametrize(("call", "message"), bad_calls())
def test_mistakes_are_named(call: str, message: str) -> None:
    torch.manual_seed(0)
    names = {
        "q": torch.randn(6, 2, 3, 8), "k": torch.randn(5, 2, 3, 8), "x": torch.randn(6, 2, 4),
        "slots": torch.zeros(5), "indices": torch.tensor([[0, 2, 5]], dtype=torch.int32),
        "rows": torch.ones(3, 2), "cols": torch.ones(2, 2),
    }  # fmt: skip
    with pytest.raises(InputError, match=message):
        eval(call, globals() | names)
