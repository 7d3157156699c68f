"""The operators in PyTorch's machinery: dispatcher, autograd, compile, export, autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import shim
import torch
from compare import BACKEND_NAMES, DISSIMILARITIES, REDUCTIONS, own_leaf
from inputs import quantised
from torch import Generator, Tensor, nn

import pc_kernels

OPS = torch.ops.pc_kernels
OPTIONS = ("logistic", 0.3, "std")


def features(rng: Generator, rows: int, grad: bool = True) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 4, generator=rng).requires_grad_(grad), quantised(rng, rows, 3)


@pytest.mark.clean_memory
@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("with_refs", [False, True])
@pytest.mark.parametrize("metric", ["euclidean", "cosine", "cityblock"])
def test_opcheck_of_the_loss(metric: str, with_refs: bool, with_grad: bool, rng: Generator) -> None:
    s, t = features(rng, 6)
    refs = features(rng, 5) if with_refs else (None, None)
    own = None if with_refs else 0
    options = (
        own,
        False,
        metric,
        "euclidean",
        *OPTIONS,
        "squared",
        None,
        "auto",
        "ieee",
        with_grad,
    )
    for keep in (None, torch.rand(6, 5 if with_refs else 6, generator=rng) < 0.8):
        arguments = ([s], t, *refs, torch.rand(1, 6), keep, *options)
        torch.library.opcheck(OPS.ranking_loss.default, arguments)


@pytest.mark.clean_memory
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck_of_the_loss_of_matrices(dtype: torch.dtype, rng: Generator) -> None:
    d_s, d_t = torch.rand(2, 5, 5, generator=rng).to(dtype)
    for with_grad in (False, True):
        options = (
            0,
            True,
            "euclidean",
            "euclidean",
            *OPTIONS,
            "huber",
            None,
            "auto",
            "ieee",
            with_grad,
        )
        for keep in (None, torch.rand(1, 5, generator=rng) < 0.8):
            arguments = ([own_leaf(d_s)], d_t, None, None, torch.rand(1, 5), keep, *options)
            torch.library.opcheck(OPS.ranking_loss.default, arguments)


@pytest.mark.clean_memory
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("name", ["soft_rank", "hard_rank"])
def test_opcheck_of_the_ranks(name: str, dtype: torch.dtype, rng: Generator) -> None:
    base = torch.randn(7, 5, generator=rng).to(dtype)
    for x in (base, base.T):
        leaf = own_leaf(x) if name == "soft_rank" else x
        public = getattr(pc_kernels, name)
        recorded: list[tuple[Any, tuple[Any, ...]]] = []

        class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                if func.namespace == "pc_kernels" and name in str(func):
                    recorded.append((func, args))  # noqa: B023 - used in this turn of the loop
                return func(*args, **(kwargs or {}))

        with Recorder():
            public(leaf)
        func, args = recorded[0]
        torch.library.opcheck(func, (leaf, *args[1:]))


def training_step(metric: str, reduction: str) -> tuple[nn.Module, Callable[..., Tensor]]:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    loss_fn = pc_kernels.PerceptionCoherenceLoss(dissimilarity=metric, reduction=reduction)

    def step(x: Tensor, teacher: Tensor) -> Tensor:
        whole = loss_fn(model(x), teacher).sum()
        padding = (teacher[:, 0] < 0.5)[None, :]
        return (
            whole + loss_fn(model(x), teacher, weights=teacher[:, 1].abs(), pair_mask=padding).sum()
        )

    return model, step


@pytest.mark.clean_memory
@pytest.mark.parametrize(
    ("compiler", "metric", "reduction"),
    [
        ("inductor", "euclidean", "mean"),
        ("aot_eager", "cosine", "sum"),
        ("aot_eager", "cityblock", "none"),
    ],
)
def test_compile_of_a_training_step(
    compiler: str, metric: str, reduction: str, rng: Generator
) -> None:
    if compiler == "inductor":
        shim.compiler()  # or a skip
    torch._dynamo.reset()
    torch.manual_seed(int(torch.randint(2**31, (1,), generator=rng)))
    model, step = training_step(metric, reduction)
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    for rows in (24, 24, 31):  # another batch size, too
        x, teacher = torch.randn(rows, 6, generator=rng), quantised(rng, rows, 3)
        results = []
        for run in (step, compiled):
            model.zero_grad()
            loss = run(x, teacher)
            loss.backward()
            results.append((loss, [p.grad.clone() for p in model.parameters()]))
        (eager, eager_grads), (loss, grads) = results
        # The same operator inside; the layers around it are fused, and round, otherwise.
        assert torch.allclose(loss, eager, rtol=1e-5)
        size = torch.stack([g.norm() for g in eager_grads]).norm()
        for got, wanted in zip(grads, eager_grads, strict=True):
            assert (got - wanted).norm() <= 1e-5 * size


@pytest.mark.clean_memory
@pytest.mark.parametrize("name", ["soft_rank", "hard_rank", "matrices"])
def test_compile_of_the_other_functions(name: str, rng: Generator) -> None:
    torch._dynamo.reset()
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "soft_rank": lambda v: pc_kernels.soft_rank(v, 0.2, dim=0),
        "hard_rank": lambda v: pc_kernels.hard_rank(v, dim=0) + v,
        "matrices": lambda v: pc_kernels.coherence_loss_from_dissimilarities(v, v.detach() ** 2),
    }
    call = calls[name]
    x = torch.rand(6, 9, generator=rng)
    results = []
    for run in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaf = own_leaf(x)
        value = run(leaf)
        value.sum().backward()
        results.append((value, leaf.grad))
    for eager, compiled in zip(*results, strict=True):
        assert torch.allclose(eager, compiled, rtol=1e-5, atol=1e-7)


@pytest.mark.clean_memory
def test_export(rng: Generator) -> None:
    s, t = features(rng, 12, grad=False)
    program = torch.export.export(pc_kernels.PerceptionCoherenceLoss(), (s, t))
    assert torch.equal(program.module()(s, t), pc_kernels.perception_coherence_loss(s, t))


def test_fake_kernels_know_shapes_and_dtypes() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            s, t = torch.randn(6, 4, dtype=dtype), torch.randn(6, 3, dtype=dtype)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            for reduction in REDUCTIONS:
                loss = pc_kernels.perception_coherence_loss(s, t, reduction=reduction)
                assert loss.dtype == wide
                assert loss.shape == ((6,) if reduction == "none" else ())
            assert pc_kernels.soft_rank(s).dtype == dtype


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("metric", DISSIMILARITIES)
def test_autocast(metric: str, backend: str, rng: Generator) -> None:
    """bfloat16 features out of autocast layers: float32 inside, gradients in the features' dtype."""
    layer = nn.Linear(6, 4)
    x, teacher = torch.randn(20, 6, generator=rng), quantised(rng, 20, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        student = layer(x)
        student.retain_grad()
        loss = pc_kernels.perception_coherence_loss(
            student, teacher, dissimilarity=metric, backend=backend
        )
    loss.backward()
    assert student.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert student.grad.dtype == torch.bfloat16
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32
    outside = own_leaf(student)
    again = pc_kernels.perception_coherence_loss(
        outside, teacher, dissimilarity=metric, backend=backend
    )
    again.backward()
    assert torch.equal(loss, again) and torch.equal(student.grad, outside.grad)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_autocast_keeps_float32_features_in_float32(backend: str, rng: Generator) -> None:
    s, t = features(rng, 30)
    d = torch.rand(9, 12, generator=rng)
    calls: list[Callable[[], Tensor]] = [
        lambda: pc_kernels.perception_coherence_loss(s, t, backend=backend),
        lambda: pc_kernels.coherence_loss_from_dissimilarities(d, d**2, backend=backend),
        lambda: pc_kernels.soft_rank(d, backend=backend),
        lambda: pc_kernels.pairwise_dissimilarity(s),
        lambda: pc_kernels.coherence(s, t).spearman,
    ]
    for call in calls:
        outside = call()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = call()
        assert inside.dtype == torch.float32 and torch.equal(inside, outside)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_float32_products_stay_float32(precision: str, rng: Generator) -> None:
    """Whatever PyTorch is told of matrix products; and what it was told stays as it was."""
    s, t = torch.randn(64, 64, generator=rng), quantised(rng, 64, 3)
    before = pc_kernels.perception_coherence_loss(s, t)
    try:
        torch.set_float32_matmul_precision(precision)
        after = pc_kernels.perception_coherence_loss(s, t)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(before, after)


@pytest.mark.parametrize("metric", ["euclidean", "cityblock", "callable"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_who_gets_a_gradient(backend: str, reduction: str, metric: str, rng: Generator) -> None:
    """Whoever asks for one and may have it: the student and its references, alone or together."""
    name = pc_kernels.reference.pairwise_dissimilarity if metric == "callable" else metric
    (s, t), (s_refs, t_refs) = features(rng, 9, grad=False), features(rng, 7, grad=False)

    def grads(*asked: bool) -> list[Tensor | None]:
        inputs = [
            x.clone().requires_grad_(a) for x, a in zip((s, t, s_refs, t_refs), asked, strict=True)
        ]
        loss = pc_kernels.perception_coherence_loss(
            *inputs, dissimilarity=name, reduction=reduction, backend=backend
        )
        assert loss.requires_grad or not (asked[0] or asked[2])
        if loss.requires_grad:
            loss.sum().backward()
        return [x.grad for x in inputs]

    both = grads(True, True, True, True)
    assert both[1] is None and both[3] is None
    assert both[0] is not None and both[2] is not None
    assert both[0].norm() > 0 and both[2].norm() > 0
    only_anchors, only_refs = grads(True, False, False, False), grads(False, False, True, False)
    assert only_anchors[2] is None and only_refs[0] is None
    assert torch.equal(only_anchors[0], both[0]) and torch.equal(only_refs[2], both[2])
    for grad in grads(False, True, False, True):  # a frozen student is no reason to fail
        assert grad is None or (grad == 0).all()


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_without_grad(backend: str, rng: Generator) -> None:
    s, t = features(rng, 14)
    expected = pc_kernels.perception_coherence_loss(s, t, backend=backend)
    assert expected.requires_grad
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            loss = pc_kernels.perception_coherence_loss(s, t, backend=backend)
            rank = pc_kernels.soft_rank(s, backend=backend)
        assert torch.equal(loss, expected.detach())
        assert not loss.requires_grad and not rank.requires_grad
    with torch.inference_mode():
        inside = pc_kernels.perception_coherence_loss(s.clone(), t.clone(), backend=backend)
    assert torch.equal(inside, expected.detach())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_a_teacher_of_inference_mode(backend: str, reduction: str, rng: Generator) -> None:
    """Autograd may not save it, so what it saves is a copy."""
    s, t = features(rng, 14)
    refs = features(rng, 9)
    options = {"backend": backend, "reduction": reduction}
    for given in ((t,), (t, refs[0].detach(), refs[1])):
        with torch.inference_mode():
            inside = [x.clone() for x in given]
        grads = [
            torch.autograd.grad(pc_kernels.perception_coherence_loss(s, *x, **options).sum(), s)
            for x in (given, inside)
        ]
        assert torch.equal(*(grad for (grad,) in grads))


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_one_tensor_in_two_roles(backend: str, rng: Generator) -> None:
    """The batch as its own references, the self pairs now among them; student and teacher alike."""
    s, t = features(rng, 11)
    loss = pc_kernels.perception_coherence_loss(s, t, s, t, backend=backend)
    (grad,) = torch.autograd.grad(loss, s)
    anchors, refs = own_leaf(s), own_leaf(s)
    pc_kernels.perception_coherence_loss(anchors, t, refs, t, backend=backend).backward()
    assert anchors.grad is not None and refs.grad is not None
    assert torch.equal(grad, anchors.grad + refs.grad)
    alike = own_leaf(s)
    pc_kernels.perception_coherence_loss(alike, alike, backend=backend).backward()
    apart = own_leaf(s)
    pc_kernels.perception_coherence_loss(apart, s.detach().clone(), backend=backend).backward()
    assert torch.equal(alike.grad, apart.grad)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_backward_twice_and_accumulation(backend: str, reduction: str, rng: Generator) -> None:
    s, t = features(rng, 10)
    loss = pc_kernels.perception_coherence_loss(s, t, reduction=reduction, backend=backend)
    upstream = torch.randn(loss.shape, generator=rng)
    (once,) = torch.autograd.grad(loss, s, upstream, retain_graph=True)
    (twice,) = torch.autograd.grad(loss, s, 2 * upstream)
    assert torch.allclose(twice, 2 * once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_inputs_stay_as_they_are(backend: str, rng: Generator) -> None:
    (s, t), refs = features(rng, 10), features(rng, 8)
    before = [x.detach().clone() for x in (s, t, *refs)]
    for metric in DISSIMILARITIES:
        for arguments in ((s, t), (s, t, *refs)):
            pc_kernels.perception_coherence_loss(
                *arguments, dissimilarity=metric, backend=backend
            ).backward()
    assert all(torch.equal(x.detach(), y) for x, y in zip((s, t, *refs), before, strict=True))
    s.data.add_(1)  # and saved tensors are guarded against changes between forward and backward
    loss = pc_kernels.perception_coherence_loss(s, t, reduction="none", backend=backend)
    with torch.no_grad():
        s.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


def double_backward_cases() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    return {
        "loss": lambda s, t: pc_kernels.perception_coherence_loss(s, t),
        "rows": lambda s, t: pc_kernels.perception_coherence_loss(s, t, reduction="none").sum(),
        "matrices": lambda s, t: pc_kernels.coherence_loss_from_dissimilarities(s, s.detach()),
        "soft_rank": lambda s, t: pc_kernels.soft_rank(s).square().sum(),
        "pairwise_dissimilarity": lambda s, t: pc_kernels.pairwise_dissimilarity(s).sum(),
    }


@pytest.mark.parametrize("name", list(double_backward_cases()))
def test_double_backward_is_refused(name: str, rng: Generator) -> None:
    """Rather than wrong without a word: a penalty on the gradient must not drop out of a loss."""
    s, t = features(rng, 8)
    loss = double_backward_cases()[name](s, t)
    with pytest.raises(RuntimeError, match=r"(?i)twice|double|second|create_graph"):
        (grad,) = torch.autograd.grad(loss, s, create_graph=True)
        (loss + grad.square().sum()).backward()


TRANSFORMED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "loss": pc_kernels.perception_coherence_loss,
    "matrices": pc_kernels.coherence_loss_from_dissimilarities,
    "soft_rank": lambda s, t: pc_kernels.soft_rank(s),
    "hard_rank": lambda s, t: pc_kernels.hard_rank(s),
    "pairwise_dissimilarity": lambda s, t: pc_kernels.pairwise_dissimilarity(s),
    "coherence": pc_kernels.coherence,
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_transforms_are_refused(name: str, rng: Generator) -> None:
    """Clearly; the reference has them."""
    function = TRANSFORMED[name]
    s, t = torch.rand(2, 3, 6, 4, generator=rng)

    def forward_mode() -> None:
        with torch.autograd.forward_ad.dual_level():
            function(torch.autograd.forward_ad.make_dual(s[0], s[1]), t[0])

    for call in (
        lambda: torch.func.vmap(function)(s, t),
        lambda: torch.func.jvp(lambda x: function(x, t[0]), (s[0],), (s[1],)),
        lambda: torch.func.grad(lambda x: function(x, t[0]))(s[0]),
        forward_mode,
    ):
        with pytest.raises(RuntimeError, match=r"torch.func transform.*pc_kernels.reference"):
            call()
    many = torch.func.vmap(pc_kernels.reference.perception_coherence_loss)(s, t)
    assert many.shape == (3,)


@pytest.mark.parametrize("overflow", [False, True])
def test_float16_training_with_a_scaler(overflow: bool, rng: Generator) -> None:
    """Scaled gradients are those of the plain step; an overflow skips the step, as it should."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24 if overflow else 2.0**10)
    torch.manual_seed(int(torch.randint(2**31, (1,), generator=rng)))
    model, step = training_step("euclidean", "mean")
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, teacher = torch.randn(24, 6, generator=rng), quantised(rng, 24, 3)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = step(x * (1e4 if overflow else 1), teacher)
    assert loss.dtype == torch.float32 and loss.isfinite()
    scaler.scale(loss).backward()
    scaled = [p.grad.clone() for p in model.parameters()]
    scaler.step(optimizer)
    scaler.update()
    moved = any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    finite = all(g.isfinite().all() for g in scaled)
    assert moved == finite and (finite or scaler.get_scale() < 2.0**24)
    if not overflow:
        assert finite
        model.zero_grad()
        with torch.no_grad():
            for p, q in zip(model.parameters(), before, strict=True):
                p.copy_(q)
        step(x, teacher).backward()
        wanted = torch.cat([p.grad.flatten() for p in model.parameters()])
        got = torch.cat([g.flatten() for g in scaled]) / 2**10
        # float16 features: 2^-11 each, amplified in the gradient by a temperature of 0.1.
        assert (got - wanted).norm() <= 0.05 * wanted.norm()


def test_the_function_can_be_applied_directly(rng: Generator) -> None:
    s, t = features(rng, 9)
    loss = pc_kernels.PerceptionCoherenceFunction.apply(s, t)
    assert torch.equal(loss, pc_kernels.perception_coherence_loss(s, t))
    loss.backward()
    assert s.grad is not None
