"""Derivatives other than by going backward once: right ones, or an error that says where to get them, never zeros."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import tiny_config
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

import llmfast
from llmfast import ops
from llmfast.backends import OPS, BackendUnavailable, reference
from llmfast.contract import CASES, Case

CASE = {  # of each op the smallest case with something to compute in every argument
    op: min(found, key=lambda case: case.elements)
    for op in OPS
    if (found := [case for case in CASES if case.op == op and case.differentiable and case.elements > 500])
}
RUNNING = {row.backend for row in llmfast.backends() if row.device == "cpu" and row.available}
KERNELS = [name for name in ("cpp", "triton") if name in RUNNING]


def call(case: Case, functions: Any) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """All results of a case in one vector, as a function of the arguments that take gradients, and these."""
    tensors = case.make(torch.float64, "cpu")
    floats = {name: t for name, t in tensors.items() if t is not None and t.is_floating_point()}
    inputs = {name: t for name, t in floats.items() if name not in case.constants}
    dtype = torch.float64 if functions is reference else torch.float32

    def function(*values: Tensor) -> Tensor:
        results = case.call(functions, {**tensors, **dict(zip(inputs, values, strict=True))})
        return torch.cat([result.flatten() for result in results])

    return function, [t.to(dtype) for t in inputs.values()]


def directions(inputs: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in inputs]


def by_jvp(function: Callable[..., Tensor], inputs: list[Tensor]) -> Tensor:
    return torch.func.jvp(function, tuple(inputs), tuple(directions(inputs)))[1]


def in_forward_mode(function: Callable[..., Tensor], inputs: list[Tensor]) -> Tensor:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, d) for t, d in zip(inputs, directions(inputs), strict=True)]
        tangent = forward_ad.unpack_dual(function(*duals)).tangent
        return torch.zeros(()) if tangent is None else tangent


def of_one_argument(function: Callable[..., Tensor], inputs: list[Tensor]) -> Tensor:
    """The last argument's alone: the first, by which a backend is chosen, has no tangent."""
    *others, last = inputs
    return torch.func.jvp(lambda t: function(*others, t), (last,), (directions(inputs)[-1],))[1]


def by_jacfwd(function: Callable[..., Tensor], inputs: list[Tensor]) -> Tensor:
    along = directions(inputs)
    step = torch.zeros(2, dtype=inputs[0].dtype)  # two directions, for vmap: there and back
    sides = torch.tensor([1.0, -1.0], dtype=step.dtype)
    moved = lambda s: function(*(t + (s * sides).sum() * d for t, d in zip(inputs, along, strict=True)))  # noqa: E731
    return torch.func.jacfwd(moved)(step)


def by_grad(function: Callable[..., Tensor], inputs: list[Tensor]) -> Tensor:
    gradients = torch.func.grad(lambda *values: function(*values).square().sum(), tuple(range(len(inputs))))(*inputs)
    return torch.cat([gradient.flatten() for gradient in gradients])


def by_hessian(function: Callable[..., Tensor], inputs: list[Tensor]) -> Tensor:
    along = directions(inputs)
    moved = lambda s: function(*(t + s * d for t, d in zip(inputs, along, strict=True))).square().sum()  # noqa: E731
    return torch.func.hessian(moved)(torch.zeros((), dtype=inputs[0].dtype))


KINDS = [by_jvp, in_forward_mode, of_one_argument, by_jacfwd, by_grad, by_hessian]


def agree(got: Tensor, expected: Tensor) -> None:
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("backend", ["auto", "pytorch"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", CASE)
def test_every_derivative_is_right(op: str, kind: Callable[..., Tensor], backend: str) -> None:
    expected = kind(*call(CASE[op], reference))
    with llmfast.use_backend(backend):
        agree(kind(*call(CASE[op], ops)), expected)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", CASE)
def test_kernels_chosen_by_name_say_that_they_have_none(op: str, kind: Callable[..., Tensor], backend: str) -> None:
    with llmfast.use_backend(backend), pytest.raises(BackendUnavailable) as error:
        kind(*call(CASE[op], ops))
    assert f"'{backend}' can't run {op} " in str(error.value) and 'use_backend("pytorch") has them' in str(error.value)


def test_explain_says_which_backend_differentiates() -> None:
    def function(x: Tensor) -> Tensor:
        said.append(llmfast.explain("gelu", x))
        return ops.gelu(x)

    said: list[Any] = []
    torch.func.jvp(function, (torch.ones(2),), (torch.ones(2),))
    assert said[0].backend == "pytorch"
    if KERNELS:
        assert f"{KERNELS[0]} can't: its kernels have no derivatives by torch.func" in said[0].reason


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_function_is_differentiated_right_inside_and_outside(backend: str) -> None:
    x, direction = torch.randn(5), torch.ones(5)
    expected = torch.func.jvp(reference.gelu, (x.double(),), (direction.double(),))[1]
    torch._dynamo.reset()
    compiled = torch.compile(ops.gelu, backend=backend)
    for _ in range(2):  # what was compiled for one is not used for the other
        torch.testing.assert_close(compiled(x), ops.gelu(x))
        agree(torch.func.jvp(compiled, (x,), (direction,))[1], expected)
        agree(in_forward_mode(compiled, [x]), in_forward_mode(reference.gelu, [x.double()]))
    inside = torch.compile(lambda x: torch.func.jvp(ops.gelu, (x,), (direction,))[1], backend=backend)
    agree(inside(x), expected)


def operators() -> list[Any]:
    spaces = {"cpp": torch.ops.llmfast, "triton": torch.ops.llmfast_triton}
    return [pytest.param(spaces[name], id=name) for name in KERNELS]


@pytest.mark.parametrize("space", operators())
def test_a_registered_operator_refuses_by_itself(space: Any) -> None:
    x, direction = torch.randn(4, requires_grad=True), torch.ones(4)
    message = "gelu.* has no derivatives by torch.func or in forward mode; .*pytorch"
    with pytest.raises(RuntimeError, match=message):
        torch.func.jvp(lambda x: space.gelu(x, "tanh"), (x.detach(),), (direction,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=message):
        space.gelu(forward_ad.make_dual(x.detach(), direction), "tanh")
    y = space.gelu(x, "tanh")
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="gelu_backward.* has no derivatives"):
        torch.autograd.grad(y, x, forward_ad.make_dual(direction, direction))


@pytest.mark.parametrize("backend", [*KERNELS, "pytorch"])
@pytest.mark.parametrize("op", CASE)
def test_vmap_runs_the_op_for_each_item(op: str, backend: str) -> None:
    with llmfast.use_backend(backend):
        function, inputs = call(CASE[op], ops)
        two = [torch.stack([t, 0.5 * t]) for t in inputs]
        expected = torch.stack([function(*inputs), function(*(0.5 * t for t in inputs))])
        torch.testing.assert_close(torch.vmap(function)(*two), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", KERNELS)
def test_backward_over_a_batch_of_gradients(backend: str) -> None:
    x = torch.randn(4, requires_grad=True)
    with llmfast.use_backend(backend):
        (rows,) = torch.autograd.grad(ops.gelu(x), x, torch.eye(4), is_grads_batched=True)
        (slope,) = torch.autograd.grad(ops.gelu(x).sum(), x)
    torch.testing.assert_close(rows, slope.diag())


# --- second derivatives, by going backward twice ----------------------------------------------------------------------


def hessian_vector_product(function: Callable[..., Tensor], inputs: list[Tensor]) -> Tensor:
    leaves = [t.requires_grad_() for t in inputs]
    gradients = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
    along = sum((g * d).sum() for g, d in zip(gradients, directions(leaves), strict=True))
    return torch.cat([h.flatten() for h in torch.autograd.grad(along, leaves)])


@pytest.mark.parametrize("op", CASE)
def test_second_derivatives_on_pytorch_are_right(op: str) -> None:
    expected = hessian_vector_product(*call(CASE[op], reference))
    with llmfast.use_backend("pytorch"), sdpa_kernel(SDPBackend.MATH) if "attention" in op else nullcontext():
        agree(hessian_vector_product(*call(CASE[op], ops)), expected)


@pytest.mark.parametrize("frozen", [0, 1])
def test_second_derivatives_of_the_loss_where_one_tensor_is_frozen(frozen: int) -> None:
    def product(functions: Any) -> Tensor:
        function, inputs = call(CASE["linear_cross_entropy"], functions)
        kept = inputs.pop(frozen)
        return hessian_vector_product(lambda free: function(*((kept, free) if frozen == 0 else (free, kept))), inputs)

    with llmfast.use_backend("pytorch"):
        agree(product(ops), product(reference))


def test_a_hessian_vector_product_of_a_models_loss() -> None:
    torch.manual_seed(0)
    model = llmfast.GPT(tiny_config()).double().eval()
    ids, targets = torch.randint(19, (2, 9)), torch.randint(19, (2, 9))
    parameters = list(model.parameters())

    def product() -> Tensor:
        gradients = torch.autograd.grad(model.loss(ids, targets), parameters, create_graph=True)
        along = sum((g * d).sum() for g, d in zip(gradients, directions(parameters), strict=True))
        return torch.cat([h.flatten() for h in torch.autograd.grad(along, parameters)])

    with llmfast.use_backend("reference"):
        expected = product()
    with llmfast.use_backend("pytorch"), sdpa_kernel(SDPBackend.MATH):
        agree(product(), expected)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("op", CASE)
def test_second_derivatives_of_kernels_are_refused(op: str, backend: str) -> None:
    name = {"bidirectional_attention": "causal_attention"}.get(op, op)
    with (
        llmfast.use_backend(backend),
        pytest.raises(RuntimeError, match=f"gradients of {name} can't be differentiated"),
    ):
        hessian_vector_product(*call(CASE[op], ops))


@pytest.mark.parametrize("space", operators())
def test_second_derivatives_of_a_registered_operator_are_refused(space: Any) -> None:
    x = torch.randn(4, requires_grad=True)
    (g,) = torch.autograd.grad(space.gelu(x, "tanh").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="can't be differentiated again: .*pytorch"):
        torch.autograd.grad(g.sum(), x)
