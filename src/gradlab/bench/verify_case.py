"""The problems of `gradlab verify` in one framework and dtype: what is computed and what differences say of it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradlab.bench.problems import CHECKED, Analytic, analytics
from gradlab.bench.verify import OPERATIONS
from gradlab.check.claims import natural_scales
from gradlab.check.differences import Estimate, directional

SLOPES = 4  # directions along which a gradient-like result is compared
COORDINATES = 6  # entries of a diagonal that are compared
DENSE = ("hessian", "hessian_diagonal")  # made for problems with few parameters alone


@dataclass
class Case:
    """A problem in one framework and dtype, as functions of the parameters."""

    loss: Callable[[Any], Any]
    model: Callable[[Any], Any]
    outer: Callable[[Any], Any]
    params: dict[str, Any]


class Lab:
    """One framework in one dtype: numpy in, results out."""

    def __init__(self, framework: str, dtype: str, device: str):
        self.functions = importlib.import_module(f"gradlab.bench._{framework}")
        self.gl = importlib.import_module(f"gradlab.{framework}")
        self.framework, self.dtype, self.device = framework, dtype, device
        self.xp = importlib.import_module("jax.numpy" if framework == "jax" else "torch")

    def arrays(self, tree: Any) -> Any:
        """A tree of numpy arrays as the framework's, in this dtype."""
        return self.functions.arrays(tree, self.dtype, self.device)

    def compiled(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """jax.jit in jax, the function as it is in (eager) torch."""
        return importlib.import_module("jax").jit(f) if self.framework == "jax" else f

    def gradient(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """The framework's own gradient: of the reference, and the unit of time."""
        return (importlib.import_module("jax") if self.framework == "jax" else self.functions).grad(f)

    def case(self, name: str) -> Case:
        """The problem of that name, its numbers rounded to float32."""
        rounded = lambda a: a.astype(np.float32).astype(np.float64) if a.dtype.kind == "f" else a
        if name in CHECKED:
            problem = CHECKED[name]()
            inputs, targets = self.arrays((rounded(problem.inputs), problem.targets))
            model = self.functions.model(problem)
            params = self.arrays({key: rounded(p) for key, p in problem.params.items()})
            outer = lambda y: self.functions.outer(y, targets)
            return Case(lambda p: outer(model(p, inputs)), lambda p: model(p, inputs), outer, params)
        analytic = next(a for a in analytics() if a.name == name)
        loss = lambda p: analytic.f(self.xp, p["x"])
        model = lambda p: self.xp.stack([loss(p), (p["x"] ** 2).sum()])
        return Case(loss, model, lambda y: (y**2).sum() / 2, self.arrays({"x": rounded(analytic.x)}))


def flat(tree: Any) -> np.ndarray:
    """All entries of a result as one float64 vector, dictionaries in key order."""
    if isinstance(tree, dict):
        return np.concatenate([flat(tree[key]) for key in sorted(tree)])
    if isinstance(tree, (list, tuple)):
        return np.concatenate([flat(child) for child in tree])
    return np.asarray(tree.detach().cpu() if hasattr(tree, "detach") else tree, np.float64).reshape(-1)


def matrix(blocks: dict[str, Any], rows: int) -> np.ndarray:
    """A tree of trees, or one row of it, as a matrix of that many rows."""
    parts = [flat(blocks[key]).reshape(rows, -1) for key in sorted(blocks)]
    return np.concatenate(parts, axis=1)


class Probe:
    """The directions of a problem, the same in both frameworks and dtypes, and its reference by differences."""

    def __init__(self, lab: Lab, name: str):
        self.case, self.lab = lab.case(name), lab
        self.shapes = {key: tuple(p.shape) for key, p in self.case.params.items()}
        self.sizes = [int(np.prod(shape)) for shape in self.shapes.values()]
        self.x = flat(self.case.params)
        draw = np.random.default_rng(11)
        scales = natural_scales(self.x, self.sizes)
        self.vs = [draw.normal(size=self.x.size) * scales for _ in range(SLOPES)]
        self.entries = draw.choice(self.x.size, min(COORDINATES, self.x.size), replace=False)
        self.scales = scales
        self.y = flat(lab.compiled(self.case.model)(self.case.params))
        self.u = draw.normal(size=self.y.size)

    def tree(self, vector: np.ndarray) -> dict[str, np.ndarray]:
        """A flat vector in the shape of the parameters."""
        parts = np.split(vector, np.cumsum(self.sizes)[:-1])
        return {
            key: part.reshape(shape) for (key, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def references(self) -> dict[str, Any]:
        """What differences say: slopes of the loss, products with the Hessian, of the Jacobian, of G."""
        lab, case = self.lab, self.case
        numpy = lambda f: lambda x: flat(f(lab.arrays(self.tree(x))))
        value, gradient = numpy(lab.compiled(case.loss)), numpy(lab.compiled(lab.gradient(case.loss)))
        model = numpy(lab.compiled(case.model))
        shape = tuple(case.model(case.params).shape)
        slope = lab.compiled(lab.gradient(case.outer))
        outer = lambda y: flat(slope(lab.arrays(y.reshape(shape))))
        slopes = _stacked([directional(value, self.x, v) for v in self.vs])
        hessian = [directional(gradient, self.x, v) for v in self.vs]
        basis = np.eye(self.x.size)[self.entries] * self.scales[self.entries, None]
        diagonal = [directional(gradient, self.x, e) for e in basis]
        moves = [directional(model, self.x, v) for v in self.vs]
        curved = directional(outer, self.y, moves[0].value)
        return {
            "gradient": slopes,
            "hvp": (hessian[0].value, hessian[0].uncertainty),
            "matmat": _joined(hessian),
            "diagonal": (
                np.array([d.value[i] / self.scales[i] for d, i in zip(diagonal, self.entries, strict=True)]),
                np.array(
                    [d.uncertainty[i] / self.scales[i] for d, i in zip(diagonal, self.entries, strict=True)]
                ),
            ),
            "jvp": (moves[0].value, moves[0].uncertainty),
            "vjp": (
                np.array([m.value @ self.u for m in moves]),
                np.array([m.uncertainty @ np.abs(self.u) for m in moves]),
            ),
            "ggn": (
                np.array([m.value @ curved.value for m in moves]),
                np.array(
                    [
                        m.uncertainty @ np.abs(curved.value) + np.abs(m.value) @ curved.uncertainty
                        for m in moves
                    ]
                ),
            ),
            "ladder": hessian[0],
        }


def _stacked(estimates: list[Estimate]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([e.value[0] for e in estimates]), np.array([e.uncertainty[0] for e in estimates])


def _joined(estimates: list[Estimate]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([e.value for e in estimates]), np.concatenate([e.uncertainty for e in estimates])


def operations(probe: Probe, lab: Lab, case: Case, dense: int) -> dict[str, Callable[[Any], Any]]:
    """Each operation as a function of the parameters; dense Hessians only up to `dense` of them."""
    gl, v = lab.gl, lab.arrays(probe.tree(probe.vs[0]))
    V = lab.arrays({k: np.stack([probe.tree(d)[k] for d in probe.vs]) for k in probe.shapes})
    u = lab.arrays(probe.u)

    def hessian_operator(p: Any) -> Any:
        H = gl.hessian_operator(case.loss, p)
        return H.matvec(v), H.matmat(V)

    def jacobian_operator(p: Any) -> Any:
        J = gl.jacobian_operator(case.model, p)
        return J.matvec(v), J.T.matvec(u)

    table = {
        "gradient": lab.gradient(case.loss),
        "hvp": lambda p: gl.hvp(case.loss, p, v),
        "hessian": lambda p: gl.hessian(case.loss, p),
        "hessian_diagonal": lambda p: gl.hessian_diagonal(case.loss, p),
        "hessian_operator": hessian_operator,
        "jacobian": lambda p: gl.jacobian(case.model, p),
        "jacobian_operator": jacobian_operator,
        "ggn_vp": lambda p: gl.ggn_vp(case.model, case.outer, p, v),
        "ggn_operator": lambda p: gl.ggn_operator(case.model, case.outer, p).matvec(v),
    }
    fits = probe.x.size <= dense
    return {op: lab.compiled(table[op]) for op in OPERATIONS if fits or op not in DENSE}


def closed_forms(analytic: Analytic, probe: Probe) -> dict[str, np.ndarray]:
    """Every operation's result by the formulas, laid out as `result` lays it out."""
    v, along, H = probe.vs[0], np.stack(probe.vs), analytic.hessian
    J = np.stack([analytic.gradient, 2 * analytic.x])  # of the model (f, Σ x²); its loss is Σ y² / 2
    return {
        "gradient": analytic.gradient,
        "hvp": H @ v,
        "hessian": H.reshape(-1),
        "hessian_diagonal": np.diag(H),
        "hessian_operator": np.concatenate([H @ v, (along @ H).reshape(-1)]),
        "jacobian": J.reshape(-1),
        "jacobian_operator": np.concatenate([J @ v, J.T @ probe.u]),
        "ggn_vp": J.T @ (J @ v),
        "ggn_operator": J.T @ (J @ v),
    }


def result(probe: Probe, operation: str, raw: Any) -> np.ndarray:
    """All numbers of an operation's result, in the flat order that both frameworks share."""
    n, m = probe.x.size, probe.y.size
    if operation == "hessian":
        return np.concatenate(
            [matrix(raw[key], int(np.prod(probe.shapes[key]))) for key in sorted(raw)]
        ).reshape(n * n)
    if operation == "jacobian":
        return matrix(raw, m).reshape(m * n)
    if operation == "hessian_operator":
        stacked = np.concatenate([flat(raw[1][key]).reshape(SLOPES, -1) for key in sorted(raw[1])], axis=1)
        return np.concatenate([flat(raw[0]), stacked.reshape(-1)])
    return flat(raw)


def compared(
    probe: Probe, operation: str, numbers: np.ndarray, refs: dict[str, Any]
) -> tuple[np.ndarray, Any]:
    """The part of a result that differences speak of, and what they say: (value, uncertainty)."""
    n, v, along = probe.x.size, probe.vs[0], np.stack(probe.vs)
    if operation == "gradient":
        return along @ numbers, refs["gradient"]
    if operation == "hvp":
        return numbers, refs["hvp"]
    if operation == "hessian":
        return numbers.reshape(n, n) @ v, refs["hvp"]
    if operation == "hessian_diagonal":
        return numbers[probe.entries], refs["diagonal"]
    if operation == "hessian_operator":
        return numbers[n:], refs["matmat"]
    if operation == "jacobian":
        return numbers.reshape(-1, n) @ v, refs["jvp"]
    if operation == "jacobian_operator":
        m = probe.y.size
        (jv, du), (slopes, ds) = refs["jvp"], refs["vjp"]
        return np.concatenate([numbers[:m], along @ numbers[m:]]), (
            np.concatenate([jv, slopes]),
            np.concatenate([du, ds]),
        )
    return along @ numbers, refs["ggn"]
