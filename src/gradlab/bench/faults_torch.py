"""What is known of torch's faults by hand: for each a reproduction of four lines, and other names it goes by.

An operation is listed as wrong only where the audit finds it and its reproduction here prints a number that is
not the right one; `right` is a plain difference of the function's values, or what its definition says.
"""

from __future__ import annotations

from dataclasses import dataclass

IMPORTS = "import torch; from torch.func import grad, jvp, vmap"
DIFFERENCES = {
    1: "(f(t + h) - f(t - h)) / (2 * h)",
    2: "(f(t + h) - 2 * f(t) + f(t - h)) / h**2",
    3: "(f(t + 2 * h) - 2 * f(t + h) + 2 * f(t - h) - f(t - 2 * h)) / (2 * h**3)",
}
PRINT = 'print(f"{wrong.item():.4g} where {right.item():.4g} is right")'


@dataclass(frozen=True)
class Fault:
    """A confirmed fault.

    Attributes:
        code: four lines that print it.
        aliases: other public names that reach the operation.
    """

    code: str
    aliases: tuple[str, ...] = ()


def _along(f: str, how: str, *aliases: str, t: float = 0.5) -> Fault:
    """f of one number t, differentiated by a nest of modes ("forward over reverse")."""
    text = "f"
    modes = how.split(" over ")
    for mode in reversed(modes):
        inner = text if text == "f" else f"lambda t: {text}"
        text = f"jvp({inner}, (t,), (o,))[1]" if mode == "forward" else f"grad({inner})(t)"
    step = {1: "1e-5", 2: "1e-4", 3: "1e-3"}[len(modes)]
    lines = [
        IMPORTS,
        f"t, o, h = torch.tensor({t}, dtype=torch.float64), torch.ones((), dtype=torch.float64), {step}",
        f"f = lambda t: {f}",
        f"wrong, right = {text}, {DIFFERENCES[len(modes)]}; {PRINT}",
    ]
    return Fault("\n".join(lines), aliases)


def _shown(setup: str, wrong: str, right: str, *aliases: str) -> Fault:
    """Any other: set-up, the number torch gives, the right one."""
    return Fault("\n".join([IMPORTS, setup, f"wrong, right = {wrong}, {right}", PRINT]), aliases)


_ROW = "torch.stack([t, t**2, 1 - t])"
_MATRIX = "torch.stack([torch.stack([t, t**2]), torch.stack([1 - t, t.sin()])])"
_FORWARD = "forward over forward"

FAULTS: dict[str, Fault] = {
    "torch.nn.functional.layer_norm": _along(
        f"torch.nn.functional.layer_norm({_ROW}, (3,))[0]", _FORWARD, "torch.layer_norm", "torch.nn.LayerNorm"
    ),
    "torch.native_layer_norm": _along(
        f"torch.native_layer_norm({_ROW}, (3,), None, None, 1e-5)[0][0]", _FORWARD
    ),
    "torch.nn.functional.batch_norm": _along(
        f"torch.nn.functional.batch_norm({_ROW}[:, None], None, None, training=True)[0, 0]",
        _FORWARD,
        "torch.batch_norm",
        "torch.nn.BatchNorm1d",
        "torch.nn.BatchNorm2d",
        "torch.nn.BatchNorm3d",
    ),
    "torch.native_batch_norm": _along(
        f"torch.native_batch_norm({_ROW}[:, None], None, None, None, None, True, 0.1, 1e-5)[0][0, 0]",
        _FORWARD,
    ),
    "torch._native_batch_norm_legit": _along(
        f"torch._native_batch_norm_legit({_ROW}[:, None], None, None, True, 0.1, 1e-5)[0][0, 0]", _FORWARD
    ),
    "torch.ops.aten._batch_norm_with_update": _along(
        f"torch.ops.aten._batch_norm_with_update({_ROW}[:, None], None, None, o.new_zeros(1), o.new_ones(1),"
        " 0.1, 1e-5)[0][0, 0]",
        _FORWARD,
    ),
    "torch.nn.functional.instance_norm": _along(
        f"torch.nn.functional.instance_norm({_ROW}[None, None])[0, 0, 0]",
        _FORWARD,
        "torch.instance_norm",
        "torch.nn.InstanceNorm1d",
        "torch.nn.InstanceNorm2d",
        "torch.nn.InstanceNorm3d",
    ),
    "torch._weight_norm": _along(
        f"torch._weight_norm({_ROW}[None], t.reshape(1, 1), 0)[0, 0]",
        "reverse over reverse",
        "torch.nn.utils.parametrizations.weight_norm",
        "torch.nn.utils.weight_norm",
    ),
    "torch.linalg.det": _along(f"torch.linalg.det({_MATRIX})", _FORWARD, "torch.det", "torch.Tensor.det"),
    "torch.logdet": _along(f"torch.logdet({_MATRIX})", _FORWARD, "torch.Tensor.logdet", t=0.9),
    "torch.linalg.slogdet": _along(
        f"torch.linalg.slogdet({_MATRIX})[1]", _FORWARD, "torch.slogdet", "torch.Tensor.slogdet"
    ),
    "torch.linalg.solve": _along(f"torch.linalg.solve({_MATRIX}, {_ROW}[:2])[0]", _FORWARD),
    "torch.linalg.solve_ex": _along(f"torch.linalg.solve_ex({_MATRIX}, {_ROW}[:2])[0][0]", _FORWARD),
    "torch.linalg.tensorsolve": _along(f"torch.linalg.tensorsolve({_MATRIX}, {_ROW}[:2])[0]", _FORWARD),
    "torch.linalg.householder_product": _along(
        f"torch.linalg.householder_product({_ROW}[:, None], t[None])[1, 0]", _FORWARD
    ),
    "torch.cholesky_inverse": _along(
        f"torch.cholesky_inverse({_MATRIX}.tril())[0, 0]", "forward", "torch.Tensor.cholesky_inverse"
    ),
    "torch.linalg.eig": _along(
        f"torch.linalg.eig({_MATRIX})[1].abs()[0, 0]", "reverse over forward", "torch.Tensor.eig"
    ),
    "torch.linalg.eigvalsh": _along(
        f"torch.linalg.eigvalsh({_MATRIX} + {_MATRIX}.mT)[0]", "reverse over forward over reverse"
    ),
    "torch.linalg.eigh": _along(
        f"torch.linalg.eigh({_MATRIX} + {_MATRIX}.mT)[1].abs()[0, 0]", "reverse over forward"
    ),
    "torch.special.i1": _along("torch.special.i1(t)", "reverse over reverse over reverse", t=0.0),
    "torch.triangular_solve": _along(
        f"torch.triangular_solve({_ROW}[:2, None], {_MATRIX})[0][0, 0]",
        "forward over reverse",
        "torch.Tensor.triangular_solve",
    ),
    "torch.cumprod": _along(
        "torch.cumprod(torch.stack([t, t - 0.5, t.sin()]), 0)[2]", _FORWARD, "torch.Tensor.cumprod"
    ),
    "torch.logcumsumexp": _along(
        "torch.logcumsumexp(torch.stack([t - 50, t]), 0)[0]", "forward", "torch.Tensor.logcumsumexp"
    ),
    "torch.scatter_reduce": _along(
        f"torch.ones(2, dtype=t.dtype).scatter_reduce(0, torch.tensor([0, 0, 1]), {_ROW}, 'prod')[0]",
        "forward",
        "torch.Tensor.scatter_reduce",
        "torch.Tensor.scatter_reduce_",
    ),
    "torch.nn.functional.hardsigmoid": _shown(
        "f, t = torch.nn.functional.hardsigmoid, torch.tensor(0.5, dtype=torch.float64)",
        "6 * grad(f)(t) - 1",
        "0 * t  # the slope is float32's 1 / 6",
        "torch.nn.Hardsigmoid",
    ),
    "torch.nn.functional.linear_cross_entropy": _along(
        f"torch.nn.functional.linear_cross_entropy(torch.stack([{_ROW}, {_ROW}]), torch.eye(3, dtype=t.dtype),"
        " torch.tensor([0, 1]), options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=1))",
        "forward",
        "torch.nn.LinearCrossEntropyLoss",
    ),
    "torch.ops.aten._safe_softmax": _along(
        "torch.ops.aten._safe_softmax(torch.stack([t, t**2]) - torch.inf, 0)[0]", "reverse over forward"
    ),
    "torch.masked.logaddexp": _along(
        "torch.masked.logaddexp(t[None], t[None], input_mask=o[None] > 0, other_mask=o[None] < 0)[0]",
        "reverse over reverse",
    ),
    "torch.as_strided_scatter": _shown(
        "x, s = torch.ones(3, dtype=torch.float64, requires_grad=True), torch.ones(1, dtype=torch.float64)",
        "torch.autograd.grad(torch.as_strided_scatter(x, s, (1,), (1,), 0).sum(), x)[0][0]",
        "torch.tensor(0.0)  # x[0] is overwritten",
    ),
    "torch.select_scatter": _shown(
        "x, s = torch.ones(2, 5, 5), torch.ones(2, 5); f = lambda x, s: torch.select_scatter(x, s, 0, 1)",
        "grad(lambda s: vmap(f)(x, s).sum())(s)[0, 0]",
        "grad(lambda s: f(x[0], s).sum())(s[0])[0]",
    ),
    "torch.roll": _shown(
        "x = torch.tensor([1.0, 2.0, 3.0]); f = lambda x: torch.roll(x, 1)", "vmap(f)(x)[0]", "f(x[0])"
    ),
    "torch.native_group_norm": _shown(
        "x = torch.ones(1, 1, 2, requires_grad=True); y = torch.native_group_norm(x, None, None, 1, 1, 2, 1, 0.1)",
        "torch.autograd.grad(y[1].sum(), x, materialize_grads=True)[0][0, 0, 0]",
        "torch.tensor(0.5)  # y[1] is the mean of x",
    ),
    "torch.autograd.Function": Fault(
        "\n".join(
            [
                IMPORTS,
                "class Cube(torch.autograd.Function):",
                "    generate_vmap_rule = True",
                "    forward = staticmethod(lambda x: x**3)",
                "    setup_context = staticmethod(lambda c, x, y: (c.save_for_backward(*x), c.save_for_forward(*x)))",
                "    backward = staticmethod(lambda c, u: 3 * c.saved_tensors[0] ** 2 * u)",
                "    jvp = staticmethod(lambda c, v: 3 * c.saved_tensors[0] ** 2 * v)",
                "t, o = torch.tensor(2.0), torch.tensor(1.0)",
                "wrong = jvp(lambda t: jvp(Cube.apply, (t,), (o,))[1], (t,), (o,))[1]",
                f"right = 6 * t; {PRINT}",
            ]
        )
    ),
    "torch.cdist": _shown(
        "a, u = torch.tensor([[0.0, 1.0], [2.0, 3.0]]), torch.tensor([[[1.0, 2.0]], [[3.0, 5.0]]]); "
        "p = torch.func.vjp(lambda x: torch.cdist(x, a), torch.ones(1, 2))[1]",
        "vmap(p)(u)[0][1, 0, 0]",
        "p(u[1])[0][0, 0]",
    ),
    "torch.ops.higher_order.while_loop": Fault(
        "\n".join(
            [
                "import torch; from torch._higher_order_ops.while_loop import while_loop",
                "a, body = torch.tensor(0.5, requires_grad=True), lambda i, x, a: (i + 1, torch.sin(a * x), a.clone())",
                "f = lambda a: while_loop(lambda i, x, a: i < 3, body, (torch.tensor(0), torch.tensor(2.0), a))[1]",
                f"wrong, right = torch.autograd.grad(f(a), a)[0], (f(a + 1e-3) - f(a - 1e-3)) / 2e-3; {PRINT}",
            ]
        )
    ),
    "torch.ops.higher_order.scan": Fault(
        "\n".join(
            [
                "import torch; from torch._higher_order_ops.scan import scan",
                "x = torch.tensor([0.5, 1.0], requires_grad=True); step = lambda c, y: ((c + y).sin(), (c + y).sin())",
                "f = lambda x: scan(step, x[0], x)[1].sum() + x[0] ** 2",
                "g = torch.autograd.grad(f(x), x, create_graph=True)[0][0]",
                "wrong, s, c = torch.autograd.grad(g, x)[0][0], (2 * x[0]).sin(), (2 * x[0]).cos()",
                f"right = 2 - 4 * s - 4 * s * (s + x[1]).cos() - 4 * c**2 * (s + x[1]).sin(); {PRINT}",
            ]
        )
    ),
    "torch.cond": Fault(
        "\n".join(
            [
                "import torch",
                "x = torch.tensor(0.5, requires_grad=True)",
                "f = lambda x: torch.cond(x > 9, torch.cos, torch.sin, (x,)) + x**2",
                "wrong = torch.autograd.grad(torch.autograd.grad(f(x), x, create_graph=True)[0], x)[0]",
                f"right = 2 - x.sin(); {PRINT}",
            ]
        ),
        ("torch.ops.higher_order.cond",),
    ),
}

_LOGARITHMS = "rounding: probabilities are formed from logarithms, to 1e-12 of themselves at inputs of 1e4"
_REPEATED = "documented as undefined where indices repeat, as in these inputs"

# Operations, or rows of one, that fail for a reason which is not a wrong derivative.
EXPLAINED: dict[str, str] = {
    "torch.normal": "samples are defined to have no derivative by mean and deviation (rsample has)",
    "torch.nn.functional.max_unpool1d": _REPEATED,
    "torch.nn.functional.max_unpool2d": _REPEATED,
    "torch.nn.functional.max_unpool3d": _REPEATED,
    "torch.logcumsumexp: hvp": _LOGARITHMS,
    "torch.logcumsumexp: reverse over reverse": _LOGARITHMS,
    "torch.nn.functional.multi_head_attention_forward": "rounding: this input saturates the softmax, whose outputs"
    " are exactly 0 and 1 and whose derivatives of 1e-11 are what is left of cancelled numbers of size 1",
}
