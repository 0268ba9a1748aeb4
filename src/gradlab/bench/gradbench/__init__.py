"""gradlab as a tool of GradBench, the public suite of differentiation benchmarks (github.com/gradbench/gradbench).

    gradbench run --eval "gradbench eval gmm" --tool "python -m gradlab.bench.gradbench --framework torch"

The suite's hello, gmm, kmeans, lse, llsq, ode, ba, ht, particle, saddle and det, on gradlab's operations, in float64.
Its lstm is left out, because the text and the files that it needs are not to be had: `define` answers success
false for it, as for any module that is not here.

`protocol` speaks the suite's JSON lines, `evaluations` turns its inputs into arrays and results into its outputs,
`_jax` and `_torch` hold the functions under the same names. `inputs` makes inputs of any size, and `validate` holds
outputs against `references`, written in numpy without either framework.
"""

EVALUATIONS = ("hello", "gmm", "kmeans", "lse", "llsq", "ode", "ba", "ht", "particle", "saddle", "det")
