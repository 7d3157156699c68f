"""The operators, as PyTorch's dispatcher knows them: schema, kernel, fake kernel, autograd.

`torch.ops.pc_kernels.*` is what `torch.compile`, `torch.export` and autocast see. The kernels choose a
backend by name at run time. A recipe travels through a schema as plain strings and numbers: it is taken
apart here, and put together (and so checked) again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .backends import select
from .backends.located import in_double
from .backends.projected import LONGEST_PROJECTED
from .cdf_rows import TAILS, CdfRows, pulled, slope_of
from .checks import check_features, check_matrix, compute_dtype, first_order_only
from .contrast import Candidates, Contrast, contrast
from .formulas import Projection
from .precision import exact_arithmetic
from .recipe import Recipe
from .sweep import Batch, sweep

_library = torch.library.Library("pc_kernels", "FRAGMENT")


def operator(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Registers `kernel` as pc_kernels::<its name>, with the schema that its annotations say.

    One kernel for all devices: it chooses the backend itself. (torch.library.custom_op would do, but
    loads the compiler stack, a second and more, on the first call.)
    """
    schema = torch.library.infer_schema(kernel, mutates_args=())
    name = kernel.__name__
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    return kernel


def fake(name: str) -> Callable[..., Any]:
    """Registers the decorated function as what pc_kernels::name does to shapes and dtypes."""
    return torch.library.register_fake(f"pc_kernels::{name}", lib=_library)


def autograd(name: str, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
    """Registers the backward of pc_kernels::name."""
    torch.library.register_autograd(
        f"pc_kernels::{name}", backward, setup_context=setup, lib=_library
    )


def run(batch: Batch, recipe: Recipe, with_grad: bool) -> tuple[Tensor, list[Tensor]]:
    """`sweep`, through the dispatcher where something looks on: a compiler, a mode, a tensor subclass.

    A recipe with callables goes straight in any case: no schema can say what they do.
    """
    if not recipe.has_names or not is_watched(*batch.students, batch.teacher):
        return sweep(batch, recipe, with_grad)
    losses, gradients = torch.ops.pc_kernels.ranking_loss(
        list(batch.students),
        batch.teacher,
        batch.student_refs,
        batch.teacher_refs,
        batch.weights,
        batch.pair_mask,
        batch.self_start,
        batch.given,
        recipe.dissimilarity,
        recipe.of_teacher,
        recipe.relaxation,
        recipe.temperature,
        recipe.scale,
        recipe.penalty,
        recipe.chunk_bytes,
        recipe.backend,
        recipe.products,
        with_grad,
    )
    return losses, gradients


def is_watched(*tensors: Tensor) -> bool:
    """Whether anything but plain eager PyTorch has to see the operator; passing it by saves time."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    return any(type(x) not in (Tensor, Parameter) for x in tensors)


@operator
def ranking_loss(
    students: list[Tensor],
    teacher: Tensor,
    student_refs: Tensor | None,
    teacher_refs: Tensor | None,
    weights: Tensor,
    pair_mask: Tensor | None,
    self_start: int | None,
    given: bool,
    dissimilarity: str,
    teacher_dissimilarity: str,
    relaxation: str,
    temperature: float,
    scale: str | None,
    penalty: str,
    chunk_bytes: int | None,
    backend: str,
    products: str,
    with_grad: bool,
) -> tuple[Tensor, list[Tensor]]:
    """`sweep` for recipes of names; the arguments are the fields of `Batch` and `Recipe`."""
    for student in students:
        if given:
            check_matrix("students", student, "[anchors, references]")
        else:
            check_features(student, teacher, student_refs, teacher_refs)
    recipe = Recipe(
        dissimilarity,
        teacher_dissimilarity,
        relaxation,
        temperature,
        scale,
        penalty,
        chunk_bytes=chunk_bytes,
        backend=backend,
        products=products,
    )
    batch = Batch(
        students, teacher, student_refs, teacher_refs, weights, pair_mask, self_start, given
    )
    return sweep(batch, recipe, with_grad)


@fake("ranking_loss")
def _(
    students: list[Tensor],
    teacher: Tensor,
    student_refs: Tensor | None,
    teacher_refs: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, list[Tensor]]:
    dtype = compute_dtype(*students, teacher, student_refs, teacher_refs)
    with_grad = arguments[-1]
    losses = teacher.new_empty((len(students), teacher.shape[0]), dtype=dtype)
    differentiated = [*students, *([] if student_refs is None else [student_refs])]
    return losses, [x.new_empty(x.shape, dtype=dtype) for x in differentiated if with_grad]


def _save_batch(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    students, teacher, student_refs, teacher_refs, _, pair_mask, *ctx.options, _ = inputs
    ctx.save_for_backward(teacher, student_refs, teacher_refs, pair_mask, *students)
    ctx.mark_non_differentiable(*output[1])
    ctx.set_materialize_grads(False)


@first_order_only
def _loss_backward(ctx: Any, grad_losses: Tensor | None, _: Any) -> tuple[Any, ...]:
    """A second pass, in which the incoming gradients are the weights."""
    teacher, student_refs, teacher_refs, pair_mask, *students = ctx.saved_tensors
    rest = (None,) * (len(ctx.options) + 3)  # weights, pair_mask … with_grad
    if grad_losses is None:
        return [None] * len(students), None, None, None, *rest
    _, gradients = torch.ops.pc_kernels.ranking_loss(
        students, teacher, student_refs, teacher_refs, grad_losses, pair_mask, *ctx.options, True
    )
    to_refs = None if student_refs is None else gradients.pop().to(student_refs.dtype)
    to_students = [g.to(s.dtype) for g, s in zip(gradients, students, strict=True)]
    return to_students, None, to_refs, None, *rest


autograd("ranking_loss", _loss_backward, _save_batch)


def run_contrast(
    batch: Candidates, recipe: Contrast, with_grad: bool
) -> tuple[Tensor, list[Tensor]]:
    """`contrast`, through the dispatcher where something looks on; a joint batch goes straight."""
    if batch.group is not None or not is_watched(batch.queries, batch.keys):
        return contrast(batch, recipe, with_grad)
    losses, gradients = torch.ops.pc_kernels.contrastive_loss(
        batch.queries,
        batch.keys,
        batch.target_queries,
        batch.target_keys,
        batch.weights,
        batch.pair_mask,
        batch.start,
        batch.columns,
        recipe.form,
        recipe.chunk_bytes,
        recipe.backend,
        recipe.products,
        recipe.parts,
        with_grad,
    )
    return losses, gradients


@operator
def contrastive_loss(
    queries: Tensor,
    keys: Tensor,
    target_queries: Tensor | None,
    target_keys: Tensor | None,
    weights: Tensor,
    pair_mask: Tensor | None,
    start: int,
    columns: int,
    form: str,
    chunk_bytes: int | None,
    backend: str,
    products: str,
    parts: int,
    with_grad: bool,
) -> tuple[Tensor, list[Tensor]]:
    """`contrast`; the arguments are the fields of `Candidates` and `Contrast`."""
    batch = Candidates(
        queries, keys, target_queries, target_keys, weights, pair_mask, start, columns
    )
    recipe = Contrast(
        form, chunk_bytes=chunk_bytes, backend=backend, products=products, parts=parts
    )
    batch.check(recipe)
    return contrast(batch, recipe, with_grad)


@fake("contrastive_loss")
def _(queries: Tensor, keys: Tensor, *arguments: Any) -> tuple[Tensor, list[Tensor]]:
    gradients = [torch.empty_like(x) for x in (queries, keys) if arguments[-1]]
    return queries.new_empty(len(queries)), gradients


def _save_candidates(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    queries, keys, target_queries, target_keys, _, pair_mask, *ctx.options, _ = inputs
    ctx.save_for_backward(queries, keys, target_queries, target_keys, pair_mask)
    ctx.mark_non_differentiable(*output[1])
    ctx.set_materialize_grads(False)


@first_order_only
def _contrast_backward(ctx: Any, grad_losses: Tensor | None, _: Any) -> tuple[Any, ...]:
    """A second pass, in which the incoming gradients are the weights."""
    queries, keys, target_queries, target_keys, pair_mask = ctx.saved_tensors
    rest = (None,) * (len(ctx.options) + 5)  # target_queries … with_grad
    if grad_losses is None:
        return None, None, *rest
    _, gradients = torch.ops.pc_kernels.contrastive_loss(
        queries, keys, target_queries, target_keys, grad_losses, pair_mask, *ctx.options, True
    )
    return *gradients, *rest


autograd("contrastive_loss", _contrast_backward, _save_candidates)


@operator
def soft_rank(
    x: Tensor, temperature: float, relaxation: str, scale: str | None, backend: str, with_grad: bool
) -> tuple[Tensor, Tensor]:
    """Soft ranks of the rows of x [N, m], in its dtype; with_grad, also the density for the backward.

    The density comes in the compute dtype, and is empty if no gradient is wanted.
    """
    recipe = rank_recipe(temperature, relaxation, scale, backend)
    if isinstance(recipe.formula, Projection) and x.shape[1] > LONGEST_PROJECTED:
        raise ValueError(
            f"relaxation {relaxation!r} ranks {LONGEST_PROJECTED} values at most; got {x.shape[1]}"
        )
    dtype = compute_dtype(x)
    with exact_arithmetic(x.device):
        engine = select(backend, x.device, dtype)
        rank, density = engine.soft_rank(x.to(dtype).contiguous(), recipe, with_grad)
    return rank.to(x.dtype).contiguous(), density


@lru_cache(maxsize=64)
def rank_recipe(temperature: float, relaxation: str, scale: str | None, backend: str) -> Recipe:
    """A recipe for soft ranks alone."""
    return Recipe(relaxation=relaxation, temperature=temperature, scale=scale, backend=backend)


@fake("soft_rank")
def _(x: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    rank = torch.empty_like(x, memory_format=torch.contiguous_format)
    return rank, x.new_empty(x.shape if options[-1] else (0,), dtype=compute_dtype(x))


@operator
def soft_rank_backward(
    grad_rank: Tensor,
    x: Tensor,
    density: Tensor,
    temperature: float,
    relaxation: str,
    scale: str | None,
    backend: str,
) -> Tensor:
    """The gradient in x [N, m] of soft ranks with gradient grad_rank [N, m], in the dtype of x."""
    recipe = rank_recipe(temperature, relaxation, scale, backend)
    dtype = compute_dtype(x)
    with exact_arithmetic(x.device):
        grad = select(backend, x.device, dtype).soft_rank_backward(
            grad_rank.to(dtype).contiguous(), x.to(dtype).contiguous(), density, recipe
        )
    return grad.to(x.dtype).contiguous()


@fake("soft_rank_backward")
def _(grad_rank: Tensor, x: Tensor, *options: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save_points(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.options = inputs[1:-1]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


@first_order_only
def _rank_backward(ctx: Any, grad_rank: Tensor | None, _: Any) -> tuple[Any, ...]:
    x, density = ctx.saved_tensors
    if grad_rank is None:
        return (None,) * 6
    if density.shape != x.shape:
        raise RuntimeError("pc_kernels::soft_rank was called with_grad=False: it has no backward")
    grad = torch.ops.pc_kernels.soft_rank_backward(grad_rank, x, density, *ctx.options)
    return grad, None, None, None, None, None


autograd("soft_rank", _rank_backward, _save_points)


@operator
def isotonic_blocks(s: Tensor, w: Tensor, kl: bool, backend: str) -> Tensor:
    """The blocks of the isotonic regression of rows s and w [N, m], descending, in float64.

    Int64 [N, m]: for each place the first of its block (`reference.isotonic`). No gradient.
    """
    if s.dim() != 2 or s.shape != w.shape:
        raise ValueError(
            f"s and w must be matrices of one shape; got {tuple(s.shape)} and {tuple(w.shape)}"
        )
    engine = select(backend, s.device, torch.float32)  # blocks are found in float64 by any
    return engine.isotonic_blocks(in_double(s).contiguous(), in_double(w).contiguous(), kl)


@fake("isotonic_blocks")
def _(s: Tensor, w: Tensor, kl: bool, backend: str) -> Tensor:
    return torch.empty_like(s, dtype=torch.int64, memory_format=torch.contiguous_format)


@operator
def hard_rank(x: Tensor, backend: str) -> Tensor:
    """Mid-ranks of the rows of x [N, m], in the dtype of x."""
    dtype = compute_dtype(x)
    rank = select(backend, x.device, dtype).hard_rank(x.to(dtype).contiguous())
    return rank.to(x.dtype).contiguous()


@fake("hard_rank")
def _(x: Tensor, backend: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@operator
def smooth_cdf(
    sources: Tensor,
    queries: Tensor,
    weights: Tensor | None,
    source_offsets: Tensor | None,
    query_offsets: Tensor | None,
    source_mask: Tensor | None,
    query_mask: Tensor | None,
    temperature: float,
    relaxation: str,
    tail: str,
    kernel: str,
    backend: str,
    with_sums: bool,
    with_slopes: bool,
) -> tuple[Tensor, Tensor]:
    """Σ_k w_k K(±(y_j − x_k)/τ) at the queries y, and the same sums of K′; `CdfRows` has the shapes.

    The sums come in the dtype that all tensors promote to, those of K′ in the compute dtype; empty where
    not wanted.
    The backward is the same operator once more, from the queries to the sources.
    """
    tensors = sources, queries, weights, source_offsets, query_offsets, source_mask, query_mask
    rows = CdfRows(*tensors, upper=tail == "upper")
    rows.check()
    recipe = rank_recipe(temperature, relaxation, None, backend)
    dtype = compute_dtype(sources, queries, weights)
    wanted = (kernel,) * with_sums + (slope_of(kernel),) * with_slopes
    with exact_arithmetic(sources.device):
        engine = select(backend, sources.device, dtype)
        found = iter(engine.kernel_sums(rows.to(dtype), recipe, wanted))
    nothing = queries.new_empty(0, dtype=dtype)
    sums = next(found) if with_sums else nothing
    slopes = next(found) if with_slopes else nothing
    return sums.to(rows.result_dtype).contiguous(), slopes.contiguous()


@fake("smooth_cdf")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    rows = CdfRows(*arguments[:7])
    with_sums, with_slopes = arguments[-2:]
    shape = (rows.channels, *rows.queries.shape)
    sums = rows.queries.new_empty(shape if with_sums else (0,), dtype=rows.result_dtype)
    dtype = compute_dtype(rows.sources, rows.queries, rows.weights)
    return sums, rows.queries.new_empty(shape if with_slopes else (0,), dtype=dtype)


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:7], output[1])
    ctx.options = inputs[7:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


@first_order_only
def _cdf_backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    """With F = Σ_k w_k K((y − x_k)/τ): ∂F/∂y = Σ w K′/τ, and to x and w go sums over the queries.

    ∂L/∂w_k = Σ_j g_j K((y_j − x_k)/τ) and ∂L/∂x_k = −w_k/τ Σ_j g_j K′((y_j − x_k)/τ).
    """
    *tensors, slopes = ctx.saved_tensors
    if grad is None:
        return (None,) * 14
    temperature, relaxation, tail, *options, _, with_slopes = ctx.options
    rows = CdfRows(*tensors)._replace(upper=tail == "upper")
    to_x, to_y, to_w = ctx.needs_input_grad[:3]
    if to_y and not with_slopes:
        raise RuntimeError(
            "pc_kernels::smooth_cdf was called with_slopes=False: it has no gradient in the queries"
        )
    rise = -temperature if rows.upper else temperature
    grads: list[Tensor | None] = [None, None, None]
    if to_x or to_w:
        *turned, upper = rows.turned(grad)
        sums, pulls = torch.ops.pc_kernels.smooth_cdf(
            *turned, temperature, relaxation, TAILS[upper], *options, to_w, to_x
        )
        if to_x:
            grads[0] = pulled(pulls, rows.weights, rows.source_mask, -rise)
        if to_w:
            grads[2] = sums
    if to_y:
        grads[1] = pulled(slopes, grad, rows.query_mask, rise)
    inputs = zip(grads, tensors, strict=False)
    return (*(None if g is None else g.to(x.dtype) for g, x in inputs), *(None,) * 11)


autograd("smooth_cdf", _cdf_backward, _save_rows)
