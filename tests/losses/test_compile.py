"""Losses under `torch.compile`: one node, the same numbers, the same sentences."""

from typing import Any

import functorch.compile
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from kdkernels import JSD, KDLoss, LinearKDLoss, TeacherHead, kd_loss, linear_kd_loss
from kdkernels.options import Impl
from tests.support.inputs import DEVICE, FAST_IMPLS, make_case


def compiled(function: Any) -> tuple[Any, list[torch.fx.GraphModule]]:
    """The function compiled whole, and the graphs that were made of it."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=keep), graphs


@pytest.mark.parametrize("impl", FAST_IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_loss_in_a_graph_equals_eager(reduction, impl: Impl) -> None:
    case = make_case()

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        return linear_kd_loss(
            hidden * 2.0,
            weight,
            case.teacher,
            labels,
            student_bias=bias,
            divergence=JSD(0.3),
            temperature=2.0,
            ce_weight=0.5,
            reduction=reduction,
            impl=impl,
        )

    results = []
    graph_loss, graphs = compiled(loss)
    for function in (loss, graph_loss):
        leaves = case.leaves()
        value = function(*leaves, case.labels)
        upstream = torch.linspace(0.5, 2.0, value.numel(), device=DEVICE).reshape(value.shape)
        results.append((value, *torch.autograd.grad(value, leaves, upstream)))
    for eager, ours in zip(*results, strict=True):
        assert torch.equal(eager, ours)
    assert len(graphs) == 1


def test_a_loss_is_one_node() -> None:
    """RowWeights in what the compiler gets to see after autograd: one operator forward, none backward."""
    case = make_case()
    student = nn.Linear(case.student_weight.shape[1], case.student_weight.shape[0], device=DEVICE)
    loss = LinearKDLoss(temperature=2.0, ce_weight=0.5)
    kinds: list[list[str]] = []

    def names(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        kinds.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return functorch.compile.make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=names, bw_compiler=names)

    def step(hidden: Tensor) -> Tensor:
        return loss(hidden, student.weight, case.teacher, case.labels, student_bias=student.bias)

    torch.compile(step, fullgraph=True, backend=backend)(case.student_hidden).backward()
    forward, backward = kinds
    assert [name for name in forward if "kdkernels" in name] == ["kdkernels.row_loss.default"]
    assert not [name for name in backward if "kdkernels" in name or "mm" in name]


def test_rows_may_change_in_number_without_a_new_graph() -> None:
    loss = KDLoss(temperature=3.0)
    function, graphs = compiled(lambda logits, teacher: loss(logits, teacher))
    for rows in (5, 7, 9):
        logits, teacher = torch.randn(2, rows, 11).unbind()
        logits.requires_grad_()
        torch._dynamo.mark_dynamic(logits, 0)
        torch._dynamo.mark_dynamic(teacher, 0)
        value = function(logits, teacher)
        (gradient,) = torch.autograd.grad(value, logits)
        # By the way that a graph takes for any size; few logits outside of one take a shorter way, with its own rounding.
        expected = kd_loss(logits, teacher, temperature=3.0, token_weight=torch.ones(rows))
        assert torch.equal(value, expected)
        assert torch.equal(gradient, torch.autograd.grad(expected, logits)[0])
        torch.testing.assert_close(value, loss(logits, teacher))
    assert len(graphs) == 1


def test_autocast_inside_and_outside_of_a_graph() -> None:
    case = make_case()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            return linear_kd_loss(hidden, weight, case.teacher, case.labels, impl="torch")

    function, _ = compiled(loss)
    results = []
    for one in (loss, function):
        hidden, weight, _bias = case.leaves()
        value = one(hidden, weight)
        results.append((value, *torch.autograd.grad(value, (hidden, weight))))
    for eager, ours in zip(*results, strict=True):
        assert eager.dtype == ours.dtype and torch.equal(eager, ours)


def test_sentences_survive_the_compiler() -> None:
    case = make_case()
    logits = case.student_logits.detach().requires_grad_()
    function, _ = compiled(lambda teacher: kd_loss(logits, teacher))
    with pytest.raises(ValueError, match="student and teacher must have the same vocabulary"):
        function(case.teacher_logits[:, :-1])
    function, _ = compiled(
        lambda labels: linear_kd_loss(
            case.student_hidden, case.student_weight, case.teacher, labels, ce_weight=1.0
        )
    )
    with pytest.raises(ValueError, match=r"labels must be in \[0, "):
        function(torch.full_like(case.labels, 10_000))


def test_what_is_not_supported_stays_a_not_implemented_error() -> None:
    case = make_case()

    def loss(hidden: torch.Tensor) -> Any:
        return linear_kd_loss(
            hidden, case.student_weight, case.teacher, case.labels, mode="low_memory", return_stats=True
        )[0]

    function, _ = compiled(loss)
    with pytest.raises(
        NotImplementedError, match="return_stats=True is not supported yet with mode='low_memory'"
    ):
        function(case.student_hidden)


def test_a_second_derivative_is_refused_in_a_graph_too() -> None:
    logits, teacher = torch.randn(2, 4, 9).unbind()
    logits.requires_grad_()
    function, _ = compiled(lambda logits: kd_loss(logits, teacher))
    (gradient,) = torch.autograd.grad(function(logits), logits, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), logits)


def test_a_teacher_made_inside_the_graph() -> None:
    case = make_case()

    def loss(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor) -> Tensor:
        teacher = TeacherHead(teacher_hidden * 1.5, case.teacher.weight)
        return linear_kd_loss(hidden, weight, teacher, divergence="reverse_kl")

    function, _ = compiled(loss)
    arguments = (case.student_hidden, case.student_weight, case.teacher.hidden)
    assert torch.equal(function(*arguments), loss(*arguments))


def test_statistics_come_out_of_the_graph() -> None:
    case = make_case()

    def loss(hidden: Tensor) -> Any:
        return linear_kd_loss(
            hidden, case.student_weight, case.teacher, case.labels, return_stats=True, impl="torch"
        )

    function, _ = compiled(loss)
    hidden = case.student_hidden.detach().requires_grad_()
    eager, eager_stats = loss(hidden)
    ours, stats = function(hidden)
    assert torch.equal(eager, ours) and ours.requires_grad
    for name, values in eager_stats._asdict().items():
        assert torch.equal(values, getattr(stats, name)), name


def test_what_reads_values_stays_outside() -> None:
    case = make_case()
    function, _ = compiled(lambda logits: kd_loss(logits, case.teacher_logits, check_finite=True))
    with pytest.raises(
        ValueError, match="check_finite=True reads the loss back, which a compiled graph cannot"
    ):
        function(case.student_logits)
