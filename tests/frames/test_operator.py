"""Specs as untrusted input, and the laws that every operator obeys, checked against its dense matrix."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framequant.errors import FrameError
from framequant.frames import FrameKind, FrameSpec, build_frame, choose_frame

SPECS = [
    FrameSpec(FrameKind.IDENTITY, 5),
    FrameSpec(FrameKind.HADAMARD, 12, seed=3),
    FrameSpec(FrameKind.HADAMARD, 7, seed=3),
    FrameSpec(FrameKind.BLOCK_HADAMARD, 24, 3, 8, seed=3),
    FrameSpec(FrameKind.FUSION, 16, 5, 4, seed=1),  # block-diagonal
    FrameSpec(FrameKind.FUSION, 15, 5, 4, seed=1),  # odd, embedded
    FrameSpec(FrameKind.FUSION, 26, 5, 8, seed=2),  # Naimark complement
    FrameSpec(FrameKind.FUSION, 26, 6, 8, seed=2),  # banded
    FrameSpec(FrameKind.FUSION, 25, 6, 8, seed=2),  # banded, odd
    FrameSpec(FrameKind.FUSION, 14, 5, 8, seed=2),  # spatial complement
]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.kind.value}-{s.dim}-{s.num_subspaces}")


@every_spec
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32))
def test_operator_obeys_its_laws(spec: FrameSpec, seed: int) -> None:
    operator = build_frame(spec)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, spec.dim, dtype=torch.float64, generator=generator)
    c = torch.randn(2, 3, spec.num_coefficients, dtype=torch.float64, generator=generator)
    matrix = operator.as_matrix()
    assert matrix.shape == (spec.num_coefficients, spec.dim)
    tight = {"rtol": 0.0, "atol": 1e-12}
    torch.testing.assert_close(operator.analysis(x), x @ matrix.T, **tight)
    torch.testing.assert_close(operator.synthesis(c), c @ matrix, **tight)
    torch.testing.assert_close(operator.synthesis(operator.analysis(x)), x, **tight)
    torch.testing.assert_close((operator.analysis(x) * c).sum(), (x * operator.synthesis(c)).sum(), **tight)


@every_spec
def test_same_spec_gives_the_same_bytes(spec: FrameSpec) -> None:
    one, other = build_frame(spec), build_frame(FrameSpec.from_dict(spec.to_dict()))
    assert torch.equal(one.as_matrix(), other.as_matrix())
    x = torch.randn(4, spec.dim)
    assert torch.equal(one.analysis(x), other.analysis(x))


@every_spec
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)]
)
def test_low_precision_stays_close(spec: FrameSpec, dtype: torch.dtype, tolerance: float) -> None:
    operator = build_frame(spec)
    x = torch.randn(64, spec.dim).to(dtype)
    coefficients = operator.analysis(x)
    assert coefficients.dtype == dtype
    exact = operator.analysis(x.double())
    assert (coefficients.double() - exact).norm() <= tolerance * exact.norm()
    assert (
        operator.synthesis(coefficients).double() - x.double()
    ).norm() <= 2 * tolerance * x.double().norm()
    assert operator.as_matrix(dtype=dtype).dtype == dtype


@every_spec
@pytest.mark.parametrize("lead", [(), (0,), (3, 0), (1, 2, 3, 4)])
def test_any_leading_shape(spec: FrameSpec, lead: tuple[int, ...]) -> None:
    operator = build_frame(spec)
    coefficients = operator.analysis(torch.zeros(*lead, spec.dim))
    assert coefficients.shape == (*lead, spec.num_coefficients)
    assert operator.synthesis(coefficients).shape == (*lead, spec.dim)


@every_spec
def test_strides_do_not_matter(spec: FrameSpec) -> None:
    operator = build_frame(spec)
    x = torch.randn(spec.dim, 6, 5, dtype=torch.float64).permute(2, 1, 0)
    torch.testing.assert_close(operator.analysis(x), operator.analysis(x.contiguous()), rtol=0, atol=1e-14)
    c = torch.randn(5, 2 * spec.num_coefficients, dtype=torch.float64)[:, ::2]
    torch.testing.assert_close(operator.synthesis(c), operator.synthesis(c.contiguous()), rtol=0, atol=1e-14)


@every_spec
def test_gradients(spec: FrameSpec) -> None:
    operator = build_frame(spec)
    with torch.inference_mode():
        operator.analysis(torch.zeros(spec.dim, dtype=torch.float64))  # must not poison the cached constants
    x = torch.randn(2, spec.dim, dtype=torch.float64, requires_grad=True)
    c = torch.randn(2, spec.num_coefficients, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(operator.analysis, (x,))
    assert torch.autograd.gradcheck(operator.synthesis, (c,))


@pytest.mark.parametrize("spec", SPECS[3:9:2], ids=lambda s: s.dim)
def test_traces_into_one_graph(spec: FrameSpec) -> None:
    operator = build_frame(spec)
    x = torch.randn(3, spec.dim)
    compiled = torch.compile(
        lambda y: operator.synthesis(operator.analysis(y)), backend="eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(x), x, rtol=0, atol=1e-5)


@every_spec
def test_a_surrounding_device_context_does_not_capture_the_constants(spec: FrameSpec) -> None:
    with torch.device("meta"):
        operator = build_frame(spec)
        matrix = operator.as_matrix()
    assert torch.equal(matrix, build_frame(spec).as_matrix())


@every_spec
def test_wrong_inputs_are_refused(spec: FrameSpec) -> None:
    operator = build_frame(spec)
    for bad in (torch.zeros(3, spec.dim + 1), torch.tensor(1.0), torch.zeros(spec.dim, dtype=torch.int64)):
        with pytest.raises(FrameError, match="acts on"):
            operator.analysis(bad)
    with pytest.raises(FrameError, match="acts on"):
        operator.synthesis(torch.zeros(3, spec.num_coefficients + 1))


@every_spec
def test_spec_survives_json(spec: FrameSpec) -> None:
    assert FrameSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert spec.redundancy == spec.num_coefficients / spec.dim
    operator = build_frame(spec)
    assert (operator.spec, operator.dim, operator.redundancy) == (spec, spec.dim, spec.redundancy)


GOOD = {"kind": "fusion", "dim": 16, "num_subspaces": 5, "subspace_dim": 4, "seed": 1}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"kind": "fussion"}, "Did you mean 'fusion'"),
        ({"kind": 3}, "kind"),
        ({"dim": 0}, "dim"),
        ({"dim": -16}, "dim"),
        ({"dim": 16.0}, "dim"),
        ({"dim": True}, "dim"),
        ({"dim": "16"}, "dim"),
        ({"dim": 10**5000}, "dim"),
        ({"num_subspaces": 10**12}, "num_subspaces"),
        ({"num_subspaces": None}, "num_subspaces"),
        ({"subspace_dim": -2}, "subspace_dim"),
        ({"num_subspaces": 1 << 20, "subspace_dim": 1 << 10}, "num_subspaces"),
        ({"num_subspaces": 3}, "num_subspaces"),  # fewer coefficients than coordinates
        ({"seed": 1 << 64}, "seed"),
        ({"seed": -1}, "seed"),
        ({"kind": "hadamard"}, "num_subspaces"),
        ({"sed": 1}, "Did you mean 'seed'"),
    ],
)
def test_bad_descriptions_are_refused_by_field(change: dict[str, Any], named: str) -> None:
    with pytest.raises(FrameError, match=named):
        FrameSpec.from_dict({**GOOD, **change})


@pytest.mark.parametrize("name", ["kind", "dim"])
def test_missing_fields_are_named(name: str) -> None:
    with pytest.raises(FrameError, match=name):
        FrameSpec.from_dict({key: value for key, value in GOOD.items() if key != name})


def test_not_a_mapping() -> None:
    with pytest.raises(FrameError, match="mapping"):
        FrameSpec.from_dict([1, 2])  # type: ignore[arg-type]


def test_kind_must_be_the_enum() -> None:
    with pytest.raises(FrameError, match="kind"):
        FrameSpec("hadamard", 4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "spec",
    [
        FrameSpec(FrameKind.HADAMARD, 1048573),  # a prime
        FrameSpec(FrameKind.FUSION, 1 << 20, (1 << 19) + 1, 2),  # one dense block
        FrameSpec(FrameKind.FUSION, 2 * 8191, 4, 2 * 4095),  # thousands of nested complements
    ],
    ids=["prime", "block", "complements"],
)
def test_hostile_but_valid_sizes_are_refused_quickly(spec: FrameSpec) -> None:
    with pytest.raises(FrameError):
        build_frame(spec)


def test_cost_is_far_below_dense() -> None:
    for dim in (768, 4096, 11008):
        operator = build_frame(choose_frame(dim, 1.125))
        assert operator.multiply_adds * 8 < operator.dim * operator.num_coefficients
