"""The contrastive loss against its formulas in float64 (contrast_truth.py), on every backend."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import contrast_truth
import pytest
import torch
import torch.nn.functional as F
from compare import BACKEND_NAMES, own_leaf
from contrast_cases import KINDS, NEAR, Case, check_not_finite, check_tiny
from interpreter import Child, names_in, needs_compiler, needs_triton
from shim import CONTRAST_FORMS
from torch import Generator, Tensor, nn

import pc_kernels
from pc_kernels import SoftTargets, contrastive_loss
from pc_kernels.backends import extension_obstacle, triton_obstacle
from pc_kernels.backends.contrast_rows import FORMS

FILE = "contrast_interpreted.py"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_formulas(backend: str, kind: str, rng: Generator) -> None:
    for sizes in ((1, 0, 3), (2, 0, 2), (33, 0, 8), (40, 13, 5)):
        case = Case(rng, kind, sizes)
        weights, mask = torch.rand(sizes[0], generator=rng), case.mask(rng)
        case.check(backend)
        case.check(backend, chunk_bytes=1)
        case.check(backend, weights, normalize=False, temperature=1.5)
        case.check(backend, weights, pair_mask=mask)
        case.check(backend, weights, pair_mask=mask, chunk_bytes=1 << 13)


@pytest.mark.parametrize("temperature", [1e-4, 1e-3, 0.01, 1.0, 100.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_hostile_temperatures(backend: str, kind: str, temperature: float, rng: Generator) -> None:
    case = Case(rng, kind, (48, 16, 24))
    case.check(backend, temperature=temperature)
    if kind == "distillation":
        targets = case.options["targets"]._replace(temperature=temperature)
        case.check(backend, targets=targets)
    if kind == "SigLIP":
        case.check(backend, temperature=temperature, bias=10.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_hostile_magnitudes(backend: str, kind: str, rng: Generator) -> None:
    case = Case(rng, kind, (20, 4, 6))
    for scale in (1e-30, 1e-12, 1e15):
        case.check(backend, scale=scale)
    for scale in (1e-12, 1e3):
        case.check(backend, scale=scale, normalize=False)
    case.features[0][3] *= 1e6
    case.check(backend, normalize=False)


@pytest.mark.parametrize("kind", ["InfoNCE", "CLIP"])
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_a_tiny_loss_keeps_its_digits(backend: str, kind: str) -> None:
    check_tiny(backend, kind)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_equal_logits(backend: str) -> None:
    """Collapsed features: every row is log K, and sums of thousands of equal terms do not drift."""
    x = torch.ones(3000, 4)
    for symmetric in (False, True):
        loss = contrastive_loss(x, x, symmetric=symmetric, backend=backend)
        assert abs(float(loss) - math.log(3000)) <= 5e-6


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_cross_entropy_of_stored_logits(backend: str, rng: Generator) -> None:
    """What PyTorch users write, in float32 itself."""
    q, k = torch.randn(2, 50, 16, generator=rng)
    logits = F.normalize(q) @ F.normalize(k).T / 0.07
    labels = torch.arange(50)
    rows = F.cross_entropy(logits, labels)
    options = {"temperature": 0.07, "backend": backend}
    assert torch.allclose(contrastive_loss(q, k, **options), rows, rtol=NEAR)
    both = (rows + F.cross_entropy(logits.T, labels)) / 2
    assert torch.allclose(contrastive_loss(q, k, **options, symmetric=True), both, rtol=NEAR)
    sums = contrastive_loss(q, k, **options, reduction="sum")
    assert torch.allclose(sums, 50 * rows, rtol=NEAR)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_reduction_none(backend: str, kind: str, rng: Generator) -> None:
    """A loss for every anchor; the backward is a second pass with the incoming gradients."""
    case = Case(rng, kind, (21, 6, 7))
    upstream, weights = torch.randn(2, 21, generator=rng)
    mask, options = case.mask(rng), {**case.options, "temperature": 0.2}
    leaves = [own_leaf(x) for x in case.features]
    got = contrastive_loss(
        *leaves, pair_mask=mask, weights=weights, reduction="none", backend=backend, **options
    )
    leaves64 = [own_leaf(x.double()) for x in case.features]
    wanted = contrast_truth.losses(*leaves64, pair_mask=mask, **options) * weights
    assert torch.allclose(got.double(), wanted, rtol=NEAR, atol=1e-7)
    grads = torch.autograd.grad((got * upstream).sum(), leaves)
    wanted_grads = torch.autograd.grad((wanted * upstream).sum(), leaves64)
    for grad, want in zip(grads, wanted_grads, strict=True):
        assert (grad - want).norm() <= NEAR * want.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_anchors_without_their_keys(backend: str, kind: str, rng: Generator) -> None:
    """Loss 0, gradient 0, no share in the mean; for the others they may still be negatives."""
    case = Case(rng, kind, (17, 5, 4))
    mask = case.mask(rng)
    mask[5] = False
    rest = [i for i in range(17) if i != 5]
    options = {**case.options, "backend": backend, "temperature": 0.3}
    q, k, refs = map(own_leaf, case.features)
    losses = contrastive_loss(q, k, refs, pair_mask=mask, reduction="none", **options)
    assert losses[5] == 0 and (losses[rest[1:]] > 0).all()
    mean = contrastive_loss(q, k, refs, pair_mask=mask, **options)
    assert torch.allclose(mean, losses.sum() / 16, rtol=NEAR)
    mean.backward()
    assert (q.grad[5] == 0).all() and (q.grad[rest[1:]] != 0).any(1).all()
    nothing = torch.zeros(1, 1, dtype=torch.bool)
    q.grad = None
    none = contrastive_loss(q, k, refs, pair_mask=nothing, **options)
    none.backward()
    assert none == 0 and (q.grad == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_what_is_not_finite(backend: str, kind: str, rng: Generator) -> None:
    check_not_finite(backend, kind, rng)


def test_a_vector_of_zeros(rng: Generator) -> None:
    q, k = torch.randn(2, 9, 4, generator=rng)
    q[3] = 0
    leaf = own_leaf(q)
    loss = contrastive_loss(leaf, k)
    loss.backward()
    assert loss.isfinite() and (leaf.grad[3] == 0).all() and leaf.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_and_strides(dtype: torch.dtype, rng: Generator) -> None:
    """Computed as float32 or float64 copies would be; gradients come in each input's own dtype."""
    q, k = torch.randn(2, 8, 30, generator=rng).to(dtype)
    leaves = [own_leaf(q), own_leaf(k)]
    loss = contrastive_loss(leaves[0].T, leaves[1].T, symmetric=True)
    loss.backward()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    copies = [own_leaf(x.T.to(wide).contiguous()) for x in (q, k)]
    wanted = contrastive_loss(*copies, symmetric=True)
    wanted.backward()
    assert loss.dtype == wide and torch.equal(loss, wanted)
    for leaf, copy in zip(leaves, copies, strict=True):
        assert leaf.grad.dtype == dtype
        assert torch.allclose(leaf.grad.T, copy.grad.to(dtype), rtol=1e-2, atol=1e-6)
    mixed = contrastive_loss(q.T, k.T.to(wide))
    assert mixed.dtype == wide
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(contrastive_loss(*copies, symmetric=True), wanted)


def test_a_queue_and_a_gradient_cache(rng: Generator) -> None:
    q, k = torch.randn(2, 12, 4, generator=rng)
    queue = pc_kernels.FeatureQueue(6, 4, 4)
    queue.enqueue(q, k)
    _, refs = queue
    loss = contrastive_loss(q, k, refs)
    assert torch.allclose(loss, contrast_truth.losses(q, k, k[6:]).mean().float(), rtol=NEAR)
    encoder = nn.Linear(4, 4)
    loss = pc_kernels.cached_backward(encoder, q.split(5), lambda s: contrastive_loss(s, k))
    cached = encoder.weight.grad.clone()
    encoder.zero_grad()
    contrastive_loss(encoder(q), k).backward()
    assert torch.allclose(encoder.weight.grad, cached, rtol=1e-4, atol=1e-7)


def test_the_module(rng: Generator) -> None:
    """A parameter among the options is the module's; options may be set, and are checked when used."""
    q, k = torch.randn(2, 10, 4, generator=rng)
    log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
    bias = nn.Parameter(torch.tensor(-10.0))
    loss_fn = pc_kernels.ContrastiveLoss(form="sigmoid", temperature=0.1, bias=bias)
    assert [name for name, _ in loss_fn.named_parameters()] == ["bias"]
    functional = contrastive_loss(q, k, form="sigmoid", logit_scale=log_scale.exp(), bias=bias)
    loss = loss_fn(q, k)
    assert torch.allclose(loss, functional, rtol=1e-6)
    functional.backward()
    assert log_scale.grad.isfinite() and bias.grad != 0
    loss_fn.temperature = -1.0
    with pytest.raises(ValueError, match="temperature must be finite and > 0; got -1"):
        loss_fn(q, k)
    assert "form='sigmoid'" in repr(loss_fn)
    assert contrastive_loss(q[:0], k[:0]) == 0


X = torch.ones(4, 3)
ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"queries": "x"}, TypeError, "queries must be a torch.Tensor; got str"),
    ({"keys": torch.ones(3, 3)}, ValueError, "same inputs: got 4 and 3 rows"),
    ({"keys": torch.ones(4, 2)}, ValueError, "queries and keys must have the same width"),
    (
        {"queries": torch.ones(4, 0), "keys": torch.ones(4, 0)},
        ValueError,
        "queries has no features",
    ),
    ({"key_refs": torch.ones(5, 2)}, ValueError, "queries and key_refs must have the same width"),
    ({"weights": torch.ones(3)}, ValueError, "weights must hold one for each anchor"),
    ({"pair_mask": torch.ones(4, 4)}, TypeError, "pair_mask must be a bool tensor"),
    ({"pair_mask": torch.ones(4, 5) > 0}, ValueError, "pair_mask must be"),
    ({"temperature": 0.0}, ValueError, "temperature must be finite and > 0; got 0.0"),
    ({"temperature": torch.zeros(())}, ValueError, "temperature must be finite and > 0"),
    ({"temperature": torch.ones(2)}, ValueError, "temperature must hold one number"),
    ({"temperature": "warm"}, TypeError, "temperature must be a number; got str"),
    ({"temperature": 0.1, "logit_scale": 10.0}, ValueError, "give one of them"),
    ({"bias": 1.0}, ValueError, "bias is of form='sigmoid'"),
    ({"bias": math.nan, "form": "sigmoid"}, ValueError, "bias must be finite"),
    ({"form": "softmin"}, ValueError, "form must be one of 'softmax', 'sigmoid'; got 'softmin'"),
    ({"form": "sigmoid", "symmetric": True}, ValueError, "symmetric is of form='softmax'"),
    ({"normalize": 1}, ValueError, "normalize must be one of True, False; got 1"),
    ({"reduction": "max"}, ValueError, "reduction must be one of"),
    ({"backend": "gpu"}, ValueError, "backend must be one of"),
    ({"chunk_bytes": 0}, ValueError, "chunk_bytes must be > 0"),
    ({"temprature": 0.1}, TypeError, r"contrastive_loss\(\) has no option 'temprature'"),
    ({"targets": X}, TypeError, "targets must be SoftTargets; got Tensor"),
    ({"targets": SoftTargets(X), "symmetric": True}, ValueError, "in one direction"),
    ({"targets": SoftTargets(X[:2])}, ValueError, "targets.queries must have 4 rows; got 2"),
    ({"targets": SoftTargets(X, X[:2])}, ValueError, "targets.keys must have 4 rows; got 2"),
    ({"targets": SoftTargets(X[:, :2])}, ValueError, "targets.queries and targets.keys must have"),
    ({"targets": SoftTargets(X, X, X)}, ValueError, "targets.key_refs and key_refs go together"),
    ({"targets": SoftTargets(X, None, X)}, ValueError, "targets.keys, which are missing"),
    ({"targets": SoftTargets(X, temperature=0)}, ValueError, "targets.temperature must be"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), ERRORS)
def test_errors(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        contrastive_loss(**{"queries": X, "keys": X, **wrong})


@pytest.mark.clean_memory
def test_opcheck(rng: Generator) -> None:
    operator = torch.ops.pc_kernels.contrastive_loss.default
    features = torch.randn(3, 6, 4, generator=rng)
    mask = torch.rand(6, 9, generator=rng) < 0.8
    for dtype in (torch.float32, torch.float64):
        q, keys, teacher = features[0].to(dtype), features[1:].reshape(12, 4)[:9].to(dtype), None
        for form, columns in (("softmax", 0), ("softmax", 9), ("sigmoid", 0), ("distillation", 0)):
            teacher = (q.flip(0), keys.flip(0)) if form == "distillation" else (None, None)
            for with_grad in (False, True):
                torch.library.opcheck(
                    operator,
                    (
                        *(own_leaf(q), own_leaf(keys), *teacher),
                        *(torch.rand(6, generator=rng).to(dtype), mask, 2, columns),
                        *(form, None, "auto", "ieee", 0, with_grad),
                    ),
                )


@pytest.mark.clean_memory
def test_compile(rng: Generator) -> None:
    """Of a training step with everything that learns, in one graph."""
    torch._dynamo.reset()
    model = nn.Linear(6, 4)
    temperature = nn.Parameter(torch.tensor(0.2))
    both = pc_kernels.ContrastiveLoss(temperature=temperature, symmetric=True)
    pairs = pc_kernels.ContrastiveLoss(form="sigmoid", bias=-1.0, reduction="none")

    def step(x: Tensor, teacher: Tensor) -> Tensor:
        soft = both(model(x), teacher) + contrastive_loss(
            model(x), teacher, targets=SoftTargets(teacher), temperature=0.3
        )
        return soft + pairs(model(x), teacher).square().mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for rows in (12, 19):
        x, teacher = torch.randn(rows, 6, generator=rng), torch.randn(rows, 4, generator=rng)
        results = []
        for run in (step, compiled):
            loss = run(x, teacher)
            results.append((loss, torch.autograd.grad(loss, [temperature, *model.parameters()])))
        (eager, grads), (loss, compiled_grads) = results
        assert torch.allclose(loss, eager, rtol=1e-5)
        for got, wanted in zip(compiled_grads, grads, strict=True):
            assert (got - wanted).norm() <= 1e-4 * wanted.norm() + 1e-7


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_instruction_sets(isa: str, python: Callable[..., Any]) -> None:
    """The tests above in processes whose kernels are of another instruction set."""
    if extension_obstacle() is not None:
        pytest.skip(str(extension_obstacle()))
    names = "test_formulas or tiny or equal or not_finite"
    chosen = ["-k", f"({names}) and cpu", "tests/test_contrastive.py"]
    done = python("-m", "pytest", "-q", "-x", *chosen, PC_KERNELS_CPU_ISA=isa)
    if f"PC_KERNELS_CPU_ISA={isa} is not one that" in done.stdout:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stdout


MEMORY = """
import json, sys, torch, pc_kernels
options = json.loads(sys.argv[1])
def status(name):
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return int(fields[name].split()[0]) * 1024
def run(rows):
    q, k = (torch.randn(rows, 16, requires_grad=True) for _ in range(2))
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    pc_kernels.contrastive_loss(q, k, **options).backward()
    return status("VmHWM") - before
run(256)
print(run(16384))
"""


@pytest.mark.parametrize("symmetric", [False, True])
def test_memory(symmetric: bool, python: Callable[..., Any]) -> None:
    """16384²: a matrix of logits would take 1 GiB."""
    if extension_obstacle() is not None:
        pytest.skip(str(extension_obstacle()))
    budget = 64 << 20
    done = python("-c", MEMORY, json.dumps({"chunk_bytes": budget, "symmetric": symmetric}))
    if "clear_refs" in done.stderr:
        pytest.skip("this kernel does not let a process reset its peak")
    assert done.returncode == 0, done.stderr
    features = 16384 * 16 * 4
    assert int(done.stdout) <= budget + 40 * features + (24 << 20)


def test_the_forms_have_one_list() -> None:
    """The chain's; Triton's codes, and those of csrc/formulas.h as the test shim has them."""
    assert list(FORMS) == list(CONTRAST_FORMS)
    if triton_obstacle() is None:
        from pc_kernels.triton_kernels.contrast_rows import CODES

        assert list(CODES) == list(FORMS) and list(CODES.values()) == [0, 1, 2]


@needs_triton
@pytest.mark.parametrize("name", names_in(FILE))
def test_in_the_interpreter(name: str, child: Child) -> None:
    child.check(name)


@needs_triton
@needs_compiler
@pytest.mark.parametrize("target", [("cuda", 80, 32), ("hip", "gfx942", 64)])
def test_triton_compiles_ahead_of_time(target: tuple[Any, ...]) -> None:
    """Every form, to machine code that keeps little in shared memory."""
    from ahead_of_time import compiled_kernel
    from triton.backends.compiler import GPUTarget

    from pc_kernels.triton_kernels import contrast_rows as kernels
    from pc_kernels.triton_kernels.contrast_launch import COLUMN_BLOCK, ROW_BLOCK

    kinds = {"keep_ptr": "*u8", "total_ptr": "*fp64", "positive_ptr": "*fp64"}
    row = {"HAS_KEEP": True, "WITH_GRAD": True, "HAS_COLUMNS": True, "BLOCK": ROW_BLOCK}
    variants = [(kernels.contrast_rows_kernel, {**row, "FORM": c}) for c in kernels.CODES.values()]
    columns = {"HAS_KEEP": True, "BLOCK": COLUMN_BLOCK}
    for kernel, constants in (*variants, (kernels.contrast_columns_kernel, columns)):
        made = compiled_kernel(kernel, constants, GPUTarget(*target), kinds)
        assert made.metadata.shared <= 16 << 10
