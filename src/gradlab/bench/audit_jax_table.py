"""The cases of `audit_jax`: points, and what is evaluated there."""

LINE = ["[-2.3, -0.7, 0.4, 1.9, 0.0]", "[1e-8, 30.0, -40.0]"]
PERIOD = ["[-2.3, -0.7, 0.4, 1.9, 0.0]", "[1e-8, 1e4, -30.0]"]
KINKED = ["[-2.3, -0.7, 0.4, 1.9]", "[0.0]"]
POSITIVE = ["[0.3, 0.9, 1.0, 2.0, 4.2]", "[1e-9, 1e-4, 60.0]"]
UNIT = ["[0.1, 0.45, 0.8]", "[1e-9, 1e-3, 0.999, 1 - 1e-9]"]
SYMMETRIC = ["[-0.8, -0.2, 0.5, 0.0]", "[1e-9, -1e-4, 0.999, 1 - 1e-9]"]
SINGLE = ["[-2.3, 0.4, 3.1], 'float32'"]
SINGLE_POSITIVE = ["[0.3, 1.1, 4.2], 'float32'"]
COMPLEX = ["[0.3 + 0.4j, -1.2 + 0.5j, 0.7 - 1.1j]"]
AXES = ["[0.5 + 0j, 0.5j]"]

ELEMENTWISE: list[tuple[str, str, list[str]]] = [
    ("jsp.special", "erf erfc dawsn expit ndtr log_ndtr i0 i0e i1 i1e", LINE),
    ("jsp.special", "erfcx", ["[-2.3, -0.7, 0.4, 1.9, 0.0]", "[1e-8, 30.0, -5.0]"]),
    ("jsp.special", "gammaln digamma gamma factorial loggamma", [*POSITIVE, "[-2.3, -0.7]"]),
    ("jsp.special", "gammaln gamma digamma", ["[-1.0 + 1e-6, -2.999]"]),
    ("jsp.special", "exp1 expi", ["[0.3, 0.9, 1.0, 2.0, 4.2]", "[1e-3, 60.0]"]),
    ("jsp.special", "spence", POSITIVE),
    ("jsp.special", "expi", ["[-2.3, -0.7]"]),
    ("jsp.special", "entr", ["[0.3, 0.9, 1e-9]", "[0.0]"]),
    ("jsp.special", "erfinv", SYMMETRIC),
    ("jsp.special", "logit ndtri", UNIT),
    ("jsp.special", "erf erfc erfcx dawsn log_ndtr i0e i1 i1e", SINGLE),
    ("jsp.special", "gammaln digamma expi exp1 spence", SINGLE_POSITIVE),
    ("jnp", "sin cos tan sinc", PERIOD),
    ("jnp", "sinh cosh tanh arctan arcsinh exp exp2 expm1 square i0", LINE),
    ("jnp", "sinc tanh log1p sqrt cbrt arctan", SINGLE_POSITIVE),
    ("jnp", "abs fabs cbrt positive negative deg2rad rad2deg nan_to_num real conj", KINKED),
    ("jnp", "sign floor ceil round trunc rint", KINKED[:1]),
    ("jnp", "log log2 log10 log1p sqrt cbrt reciprocal", POSITIVE),
    ("jnp", "arcsin arccos arctanh", SYMMETRIC),
    ("jnp", "arccosh", ["[1.2, 3.0, 9.0, 1e5]", "[1.0 + 1e-9, 1.001]"]),
    ("nn", "sigmoid softplus silu gelu log_sigmoid tanh mish swish squareplus soft_sign", LINE),
    ("nn", "relu relu6 elu selu celu leaky_relu hard_tanh hard_sigmoid hard_silu", KINKED),
    ("nn", "sparse_plus sparse_sigmoid", KINKED),
    ("nn", "sparse_plus hard_tanh", ["[1.0]"]),
    ("nn", "elu selu celu", ["[1e-8, -1e-8, -30.0]"]),
    ("nn", "log1mexp", ["[0.3, 0.9, 1.7]", "[1e-9, 50.0]"]),
    ("lax", "rsqrt lgamma digamma", POSITIVE[:1]),
    ("lax", "logistic erf_inv bessel_i0e bessel_i1e", ["[-0.9, 0.2, 0.7, 0.0]"]),
    ("lax", "bessel_i1e bessel_i0e", ["[1e-9, -1e-4, 7.9, 8.1, 500.0]"]),
    ("optax.losses", "l2_loss log_cosh", LINE),
    ("optax.losses", "huber_loss", ["[-2.3, 0.4, 1.9, 0.0]", "[1.0]"]),
    ("jnp", "sin exp tanh log sqrt square reciprocal arctan arcsinh arccos log1p expm1 sinc", COMPLEX),
    ("jnp", "abs angle real imag conj", COMPLEX + AXES),
    ("jnp", "sqrt log", AXES),
    ("jsp.special", "wofz", COMPLEX),
]
VECTOR, MATRIX, SQUARE = "normal(key(0), (5,))", "normal(key(0), (3, 4))", "normal(key(0), (3, 3))"

EXPRESSIONS: list[tuple[str, str]] = [
    (
        MATRIX,
        """
        jnp.sum(x, axis=1)
        jnp.prod(x)
        jnp.prod(x, axis=1, keepdims=True)
        jnp.mean(x, axis=(0, 1))
        jnp.var(x, axis=1, ddof=1)
        jnp.std(x, axis=0)
        jnp.max(x, axis=1)
        jnp.min(x)
        jnp.ptp(x, axis=1)
        jnp.median(x, axis=1)
        jnp.quantile(x, 0.3, axis=1)
        jnp.percentile(x, jnp.array([10.0, 75.0]))
        jnp.nansum(x)
        jnp.nanmean(x, axis=0)
        jnp.nanvar(x)
        jnp.nanstd(x, axis=1)
        jnp.nanprod(x, axis=1)
        jnp.nanmax(x, axis=1)
        jnp.nanmedian(x)
        jnp.average(x, axis=1, weights=jnp.array([0.1, 0.2, 0.3, 0.4]))
        jnp.cumsum(x, axis=1)
        jnp.cumprod(x, axis=1)
        jnp.nancumsum(x)
        jnp.nancumprod(x, axis=0)
        jnp.cumulative_prod(x[0], include_initial=True)
        jnp.diff(x, n=2, axis=1)
        jnp.ediff1d(x)
        jnp.gradient(x)[1]
        jnp.trapezoid(x, axis=1)
        jnp.sort(x, axis=1)
        jnp.partition(x, 2, axis=1)
        jnp.take_along_axis(x, jnp.argsort(x, axis=1), axis=1)
        jnp.cov(x)
        jnp.corrcoef(x)
        jnp.linalg.norm(x)
        jnp.linalg.norm(x, ord=1)
        jnp.linalg.norm(x, ord=2)
        jnp.linalg.norm(x, ord=-2)
        jnp.linalg.norm(x, ord="nuc")
        jnp.linalg.norm(x, axis=1, ord=3)
        jnp.linalg.norm(x, axis=1, ord=jnp.inf)
        jnp.linalg.vector_norm(x, axis=1, ord=0.5)
        jnp.linalg.matrix_norm(x)
        jnp.linalg.svd(x, compute_uv=False)
        jnp.linalg.svd(x, full_matrices=False)[0] ** 2
        jnp.linalg.svdvals(x.T)
        jnp.linalg.pinv(x)
        jnp.linalg.pinv(x.T)
        jnp.linalg.cond(x)
        jnp.linalg.lstsq(x, jnp.arange(3.0))[0]
        jnp.linalg.lstsq(x.T, jnp.arange(4.0))[0]
        jnp.linalg.qr(x)[1]
        jnp.linalg.qr(x.T)
        jnp.linalg.qr(x.T, mode="r")
        jnp.linalg.multi_dot([x, x.T, x])
        jnp.linalg.outer(x[0], x[1])
        jnp.linalg.cross(x[:, :3], x[:, 1:])
        jnp.linalg.trace(x)
        jnp.linalg.diagonal(x)
        jnp.linalg.vecdot(x, x[::-1])
        jnp.einsum("ij,kj->ik", x, x)
        jnp.einsum("ij,ij->", x, x**2)
        jnp.tensordot(x, x, axes=([1], [1]))
        jnp.dot(x, x.T)
        jnp.inner(x, x)
        jnp.kron(x, x[:2])
        jnp.vdot(x, jnp.sin(x))
        jnp.matmul(x, x.T)
        jnp.matvec(x, x[0])
        jnp.vecmat(x[:, 0], x)
        jnp.convolve(x[0], x[1])
        jnp.correlate(x[0], x[1], mode="same")
        jnp.interp(x, jnp.array([-5.0, -0.1, 0.9, 5.0]), jnp.array([1.0, 0.0, 3.0, 2.0]))
        jnp.interp(0.3, jnp.cumsum(jnp.exp(x[0])) - 1, x[1])
        jnp.polyval(x[0], x[1])
        jnp.polyfit(x[0], x[1], 2)
        jnp.vander(x[0], 4)
        jnp.roots(x[0], strip_zeros=False)
        jnp.poly(x[0])
        jnp.polydiv(jnp.exp(x[0]), jnp.exp(x[1, :2]))[0]
        jnp.where(x > 0, x**2, jnp.sin(x))
        jnp.select([x > 1, x > 0], [x**2, x**3], jnp.exp(x))
        jnp.piecewise(x, [x < 0], [jnp.sin, jnp.exp])
        jnp.clip(x, -0.5, 0.5)
        jnp.maximum(x, x[::-1] ** 2)
        jnp.minimum(x, 0.1)
        jnp.fmax(x, 0.1)
        jnp.fmin(x, x[:, ::-1] ** 2)
        jnp.arctan2(x, x[::-1] + 0.1)
        jnp.hypot(x, x[:, ::-1] + 0.1)
        jnp.logaddexp(x, x[:, ::-1] * 2)
        jnp.logaddexp2(x, 0.3)
        jnp.power(jnp.abs(x), 1.7)
        jnp.power(x, 3)
        jnp.float_power(jnp.exp(x), x)
        jnp.divide(x, x[:, ::-1])
        jnp.mod(x, 0.7)
        jnp.remainder(x, jnp.exp(x[::-1]))
        jnp.fmod(x, 0.7)
        jnp.floor_divide(x, 0.7)
        jnp.divmod(x, 0.7)[1]
        jnp.modf(x)[0]
        jnp.copysign(x, x[::-1])
        jnp.ldexp(x, 3)
        jnp.frexp(x)[0]
        jnp.nextafter(x, 1.0)
        jnp.heaviside(x, 0.5)
        jnp.unwrap(3 * x, axis=1)
        jnp.roll(x, 1, axis=1)
        jnp.rot90(x)
        jnp.pad(x, 2, mode="reflect")
        jnp.pad(x, ((0, 1), (2, 0)), mode="linear_ramp")
        jnp.pad(x, 1, mode="mean")
        jnp.pad(x, 1, mode="maximum")
        jnp.repeat(x, 2, axis=0)
        jnp.tile(x, (2, 1))
        jnp.tril(x) @ jnp.triu(x).T
        jnp.take(x, jnp.array([0, 2, 2, 0]), axis=0)
        jnp.concatenate([x, jnp.sin(x)], axis=1)
        jnp.histogram(x, bins=3, weights=jnp.sin(x))[0]
        jnp.bincount(jnp.array([0, 2, 2]), weights=x[:, 0], length=4)
        jnp.apply_along_axis(lambda row: row / row.sum(), 1, x)
        jnp.vectorize(lambda a, b: a * jnp.sin(b))(x, x[0])
        jnp.linspace(x[0], x[1], 5)
        jnp.logspace(x[0, 0], x[0, 1], 4)
        jnp.geomspace(jnp.exp(x[0]), jnp.exp(x[1]), 4)
        nn.softmax(x, axis=1)
        nn.log_softmax(x)
        nn.logsumexp(x, axis=1, b=jnp.array([0.1, 0.5, 2.0, 1.0]))
        nn.logsumexp(x, axis=0, b=jnp.array([[-1.0], [5.0], [2.0]]), return_sign=True)[0]
        nn.logmeanexp(x, axis=1)
        nn.standardize(x)
        nn.glu(x)
        nn.softmax(x, where=x > -0.5, axis=1)
        nn.gelu(x, approximate=False)
        nn.hard_tanh(x)
        lax.cumsum(x, axis=1, reverse=True)
        lax.cumprod(x, axis=1)
        lax.cummax(x, axis=1)
        lax.cummin(x, axis=0, reverse=True)
        lax.cumlogsumexp(x, axis=1)
        lax.top_k(x, 2)[0]
        lax.approx_max_k(x, 2)[0]
        lax.sort(x, dimension=0)
        lax.sort_key_val(x, x**2)[1]
        lax.reduce_max(x, (1,))
        lax.reduce_prod(x, (0,))
        lax.reduce_window(x, 0.0, lax.add, (2, 2), (1, 1), "VALID")
        lax.reduce_window(x, -jnp.inf, lax.max, (2, 2), (1, 1), "SAME")
        lax.reduce(x, 1.0, lax.mul, (1,))
        lax.reduce_precision(x, 8, 40)
        lax.dynamic_slice(x, (1, 1), (2, 2))
        lax.dynamic_update_slice(x, jnp.sin(x[:2, :2]), (1, 2))
        lax.associative_scan(jnp.multiply, x, axis=1)
        lax.associative_scan(jnp.matmul, jnp.einsum("ni,nj->nij", x, x))
        lax.integer_pow(x, -3)
        lax.pow(jnp.exp(x), x)
        lax.pad(x, 0.0, ((1, 0, 1), (0, -1, 0)))
        lax.rem(x, 0.7)
        lax.clamp(-0.5, x, 0.5)
        lax.fft(lax.complex(x, x), "fft", (4,)).real
        lax.map(lambda row: row @ row[::-1], x)
        lax.fori_loop(0, 4, lambda i, y: jnp.sin(y) * x, x)
        lax.while_loop(lambda c: c[0] < 4, lambda c: (c[0] + 1, jnp.sin(c[1]) * x), (0, x))[1]
        lax.cond(x[0, 0] > 0, jnp.sin, jnp.exp, x)
        lax.switch(2, [jnp.sin, jnp.exp, jnp.tanh], x)
        lax.scan(lambda c, row: (jnp.tanh(c * row + 1), c @ row), x[0], x)
        lax.platform_dependent(x, cpu=jnp.sin, default=jnp.sin)
        lax.linalg.qdwh(x.T)[0]
        lax.linalg.svd(x, full_matrices=False)[1]
        lax.linalg.symmetric_product(x, jnp.eye(3))
        x.at[0].set(x[1] ** 2)
        x.at[jnp.array([0, 0, 2])].add(x**2)
        x.at[jnp.array([0, 2])].multiply(x[1:] + 2)
        x.at[jnp.array([0, 2])].divide(jnp.exp(x[1:]))
        x.at[jnp.array([0, 2])].power(2)
        x.at[jnp.array([0, 0, 2])].max(jnp.sin(3 * x))
        x.at[jnp.array([0, 0, 2])].min(jnp.sin(3 * x))
        x.at[jnp.array([0, 2])].apply(jnp.sin)
        jax.ops.segment_sum(x, jnp.array([0, 2, 0]), 3)
        jax.ops.segment_prod(x, jnp.array([0, 1, 0]), 2)
        jax.ops.segment_max(x, jnp.array([0, 1, 0]), 2)
        jax.ops.segment_min(x, jnp.array([0, 1, 0]), 2)
        jax.image.resize(x, (5, 7), "linear")
        jax.image.resize(x, (5, 7), "cubic")
        jax.image.resize(x, (2, 2), "lanczos3")
        jax.image.resize(x, (6, 8), "nearest")
        jsp.special.logsumexp(x, axis=1)
        jsp.special.xlogy(jnp.abs(x), jnp.exp(x))
        jsp.special.xlog1py(x, jnp.exp(x))
        jsp.special.kl_div(jnp.exp(x), jnp.exp(x[:, ::-1]))
        jsp.special.rel_entr(jnp.exp(x), jnp.exp(x[:, ::-1]))
        jsp.special.boxcox(jnp.exp(x), 0.3)
        jsp.special.boxcox1p(jnp.exp(x), 0.3)
        jsp.stats.sem(x, axis=1)
        jsp.stats.gaussian_kde(x[0])(x[1])
        jsp.integrate.trapezoid(x, axis=1)
        jsp.signal.convolve(x, x[:2, :2], mode="same")
        jsp.signal.convolve2d(x, x[:2, :2])
        jsp.signal.correlate2d(x, x[:2, :2], mode="valid")
        jsp.signal.fftconvolve(x, x[:2, :3])
        jsp.signal.detrend(x, axis=1)
        jsp.signal.welch(x.ravel(), nperseg=6)[1]
        jsp.signal.stft(x.ravel(), nperseg=6)[2]
        jsp.signal.csd(x[0], x[1], nperseg=4)[1]
        jsp.fft.dct(x)
        jsp.fft.idct(x, norm="ortho")
        jsp.fft.dctn(x)
        jsp.fft.idctn(x)
        jsp.linalg.svd(x, compute_uv=False)
        jsp.linalg.toeplitz(x[0], x[1])
        jsp.linalg.block_diag(x, jnp.sin(x))
        jsp.linalg.qr(x.T, mode="economic")[0]
        jsp.linalg.polar(x.T)[0]
        jsp.linalg.circulant(x[0])
        jsp.linalg.companion(x[0])
        jsp.ndimage.map_coordinates(x, [jnp.array([0.4, 1.3]), jnp.array([1.2, 2.6])], order=1)
        optax.losses.softmax_cross_entropy(x, nn.softmax(x[::-1]))
        optax.losses.softmax_cross_entropy_with_integer_labels(x, jnp.array([0, 3, 1]))
        optax.losses.safe_softmax_cross_entropy(x, jnp.eye(3, 4))
        optax.losses.poly_loss_cross_entropy(x, jnp.eye(3, 4))
        optax.losses.sigmoid_binary_cross_entropy(x, jnp.eye(3, 4))
        optax.losses.sigmoid_focal_loss(x, jnp.eye(3, 4))
        optax.losses.cosine_similarity(x, x[::-1])
        optax.losses.cosine_distance(x, x[::-1] + 1)
        optax.losses.kl_divergence(nn.log_softmax(x), jnp.eye(3, 4))
        optax.losses.kl_divergence_with_log_targets(nn.log_softmax(x), nn.log_softmax(x[::-1]))
        optax.losses.convex_kl_divergence(nn.log_softmax(x), nn.softmax(x[::-1]))
        optax.losses.generalized_kl_divergence(x, nn.softmax(x[::-1]))
        optax.losses.squared_error(x)
        optax.losses.huber_loss(x, jnp.zeros(4), delta=0.7)
        optax.losses.hinge_loss(x, jnp.sign(x[::-1]))
        optax.losses.perceptron_loss(x, jnp.sign(x[::-1]))
        optax.losses.multiclass_hinge_loss(x, jnp.array([0, 3, 1]))
        optax.losses.multiclass_perceptron_loss(x, jnp.array([0, 3, 1]))
        optax.losses.multiclass_sparsemax_loss(x, jnp.array([0, 3, 1]))
        optax.losses.sparsemax_loss(x, jnp.ones((3, 4)))
        optax.losses.smooth_labels(x, 0.1)
        optax.losses.ntxent(x, jnp.array([0, 1, 0]))
        optax.losses.triplet_margin_loss(x[0], x[1], x[2])
        optax.losses.dice_loss(x[None], nn.one_hot(jnp.array([[0, 3, 1]]), 4))
        optax.losses.ranking_softmax_loss(x, jnp.eye(3, 4))
        optax.losses.ctc_loss(x[None], jnp.zeros((1, 3)), jnp.array([[1, 2]]), jnp.zeros((1, 2)))
        optax.safe_norm(x, 1e-3)
        optax.global_norm(x)
        optax.projections.projection_simplex(x[0])
        optax.projections.projection_l2_ball(x[0])
        """,
    ),
    (
        SQUARE,
        """
        jnp.linalg.det(x)
        jnp.linalg.slogdet(x)[1]
        jnp.linalg.inv(x)
        jnp.linalg.solve(x, jnp.arange(3.0))
        jnp.linalg.solve(x @ x.T, x)
        jnp.linalg.cholesky(x @ x.T + jnp.eye(3))
        jnp.linalg.cholesky(x @ x.T + jnp.eye(3), upper=True)
        jnp.linalg.eigh(x + x.T)[0]
        jnp.linalg.eigh(x @ x.T)[1] ** 2
        jnp.linalg.eigvalsh(x + x.T)
        jnp.linalg.eigvals(x)
        jnp.linalg.eig(x)[0]
        abs(jnp.linalg.eig(x)[1])
        jnp.linalg.matrix_power(x, 3)
        jnp.linalg.matrix_power(x, -2)
        jnp.linalg.matrix_power(x, 0)
        jnp.linalg.qr(x)
        jnp.linalg.svd(x)[0] ** 2
        jnp.linalg.svd(x)[2] ** 2
        jnp.linalg.tensorinv(x, ind=1)
        jnp.linalg.tensorsolve(x, jnp.arange(3.0))
        jnp.linalg.norm(x, ord=-1)
        jnp.linalg.norm(x, ord=jnp.inf)
        jsp.linalg.det(x)
        jsp.linalg.inv(x)
        jsp.linalg.solve(x, jnp.arange(3.0))
        jsp.linalg.solve(x @ x.T + jnp.eye(3), jnp.arange(3.0), assume_a="pos")
        jsp.linalg.cholesky(x @ x.T + jnp.eye(3), lower=True)
        jsp.linalg.cho_solve(jsp.linalg.cho_factor(x @ x.T + jnp.eye(3)), jnp.arange(3.0))
        jsp.linalg.lu(x)[2]
        jsp.linalg.lu_factor(x)[0]
        jsp.linalg.lu_solve(jsp.linalg.lu_factor(x), jnp.arange(3.0))
        jsp.linalg.solve_triangular(x + 3 * jnp.eye(3), jnp.arange(3.0), lower=True)
        jsp.linalg.solve_triangular(x + 3 * jnp.eye(3), jnp.eye(3), trans=1)
        jsp.linalg.eigh(x + x.T)[0]
        jsp.linalg.eigh_tridiagonal(x[0], x[1, :2], eigvals_only=True)
        jsp.linalg.expm(x)
        jsp.linalg.expm(10 * x)
        jsp.linalg.expm_frechet(x, jnp.eye(3), compute_expm=False)
        jsp.linalg.funm(x, jnp.exp)
        jsp.linalg.sqrtm(x @ x.T + jnp.eye(3))
        jsp.linalg.schur(x)[0]
        jsp.linalg.hessenberg(x)
        jsp.linalg.solve_sylvester(x, x.T + 3 * jnp.eye(3), jnp.eye(3))
        jsp.linalg.dft(3).real @ x
        lax.linalg.triangular_solve(x + 3 * jnp.eye(3), jnp.eye(3), left_side=True, lower=True)
        lax.linalg.tridiagonal_solve(x[0], x[1] + 5, x[2], jnp.ones((3, 1)))
        lax.linalg.tridiagonal(x + x.T)[1]
        lax.linalg.lu(x)[0]
        lax.linalg.householder_product(x, x[0])
        lax.linalg.cholesky(x @ x.T + jnp.eye(3))
        lax.linalg.cholesky_update(jnp.triu(x), x[0])
        lax.linalg.eigh(x + x.T)[1]
        lax.linalg.eig(x, compute_left_eigenvectors=False, compute_right_eigenvectors=False)[0]
        lax.linalg.qr(x, full_matrices=False)[1]
        jax.scipy.sparse.linalg.cg(x @ x.T + jnp.eye(3), jnp.arange(3.0), tol=1e-14)[0]
        jax.scipy.sparse.linalg.gmres(x + 3 * jnp.eye(3), jnp.arange(3.0), tol=1e-14)[0]
        jax.scipy.sparse.linalg.bicgstab(x + 3 * jnp.eye(3), jnp.arange(3.0), tol=1e-14)[0]
        jsp.stats.multivariate_normal.logpdf(x[0], x[1], x @ x.T + jnp.eye(3))
        """,
    ),
    (
        VECTOR,
        """
        jnp.linalg.norm(x)
        jnp.linalg.norm(x, ord=1)
        jnp.linalg.norm(x, ord=4)
        jnp.linalg.norm(x, ord=-1)
        jnp.fft.fft(x)
        jnp.fft.ifft(x)
        jnp.fft.rfft(x)
        jnp.fft.irfft(jnp.fft.rfft(x) ** 2, n=5)
        jnp.fft.irfft(x)
        jnp.fft.hfft(x)
        jnp.fft.ihfft(x)
        jnp.fft.fftshift(x) ** 2
        jnp.fft.rfft(x, n=7, norm="ortho")
        jnp.abs(jnp.fft.rfft(x)) ** 2
        jnp.kaiser(5, jnp.exp(x[0]))
        jnp.blackman(5) * x
        jnp.diag(x) @ jnp.flip(x)
        jnp.trim_zeros(x)
        jnp.unique(x, size=5)
        jnp.compress(jnp.array([1, 0, 1, 0, 1]), x)
        jnp.insert(x, 2, x[0] ** 2)
        jnp.delete(x, 1) ** 2
        jnp.fill_diagonal(jnp.eye(5), x, inplace=False) ** 2
        jnp.put(x, jnp.array([0, 2]), x[3:] ** 2, inplace=False)
        nn.one_hot(1, 5) * x
        lax.conv(x[None, None], x[None, None, :3], (1,), "SAME")
        jsp.special.multigammaln(x + 6, 3)
        jsp.special.polygamma(2, jnp.exp(x))
        jsp.special.polygamma(1, -jnp.exp(x))
        jsp.special.zeta(2 + jnp.exp(x), 1.5)
        jsp.special.zeta(2.5, jnp.exp(x))
        jsp.special.expn(3, jnp.exp(x))
        jsp.special.expn(0, jnp.exp(x))
        jsp.special.expn(2, 3 + jnp.exp(x))
        jsp.special.sici(jnp.exp(x))
        jsp.special.sici(5 + jnp.exp(x))
        jsp.special.fresnel(x)
        jsp.special.fresnel(4 * x)
        jsp.special.bessel_jn(x + 3, v=4)
        jsp.special.poch(jnp.exp(x), 2.5)
        jsp.special.hyp1f1(1.3, 2.1, x)
        jsp.special.hyp1f1(jnp.exp(x), 2.1, 0.7)
        jsp.special.hyp1f1(1.3, jnp.exp(x), 0.7)
        jsp.special.hyp1f1(1.3, 2.1, 20 * x)
        jsp.special.hyp2f1(1.3, 0.4, 2.1, nn.sigmoid(x))
        jsp.special.hyp2f1(jnp.exp(x), 0.4, 2.1, 0.3)
        jsp.special.owens_t(x, 0.7)
        jsp.special.owens_t(0.7, x)
        jsp.special.sph_harm_y(jnp.array([3]), jnp.array([2]), x[:1], x[1:2], n_max=3)
        jsp.special.beta(jnp.exp(x), 1.3)
        jsp.special.betaln(jnp.exp(x), jnp.exp(x[::-1]))
        jsp.special.betainc(1.2, 2.3, nn.sigmoid(x))
        jsp.special.betainc(jnp.exp(x), 2.3, 0.4)
        jsp.special.betainc(1.2, jnp.exp(x), 0.4)
        jsp.special.gammainc(1.7, jnp.exp(x))
        jsp.special.gammainc(jnp.exp(x), 1.3)
        jsp.special.gammaincc(1.7, jnp.exp(x))
        jsp.special.gammaincc(jnp.exp(x), 1.3)
        jsp.special.gammainc(20 * jnp.exp(x), 30.0)
        jsp.special.comb(5.5 + x, 2.0)
        jsp.special.log_softmax(x)
        lax.igamma(2.0, jnp.exp(x))
        lax.igammac(2.0, jnp.exp(x))
        lax.igamma_grad_a(2.0, jnp.exp(x))
        lax.random_gamma_grad(jnp.exp(x), jnp.exp(-x))
        lax.polygamma(1.0, jnp.exp(x))
        lax.zeta(3.0, jnp.exp(x))
        jax.random.gamma(key(3), jnp.exp(x))
        jax.random.beta(key(3), jnp.exp(x), 2.0)
        jax.random.dirichlet(key(3), jnp.exp(x))
        jax.random.t(key(3), jnp.exp(x))
        jax.scipy.optimize.minimize(lambda y: jnp.sum((y - x) ** 2), jnp.zeros(5), method="BFGS").x
        odeint(lambda y, t: jnp.sin(y) * x, x, jnp.array([0.0, 0.7, 1.0]), rtol=1e-12, atol=1e-12)
        odeint(lambda y, t: -y * t, x, jnp.array([0.0, 1.0]))
        optax.linear_schedule(x[0], x[1], 10)(3)
        jsp.linalg.toeplitz(x)
        jsp.linalg.hankel(x)
        """,
    ),
    (
        "(0.4 + normal(key(0), (4,)) ** 2, 0.7, 1.3)",
        """
        jsp.stats.norm.logpdf(*x)
        jsp.stats.norm.cdf(*x)
        jsp.stats.norm.logcdf(*x)
        jsp.stats.norm.logsf(*x)
        jsp.stats.norm.ppf(nn.sigmoid(x[0]), *x[1:])
        jsp.stats.gamma.logpdf(x[0], x[2])
        jsp.stats.gamma.cdf(x[0], x[2])
        jsp.stats.gamma.logsf(x[0], x[2])
        jsp.stats.beta.logpdf(nn.sigmoid(x[0]), *x[1:])
        jsp.stats.beta.cdf(nn.sigmoid(x[0]), *x[1:])
        jsp.stats.chi2.logpdf(x[0], x[2])
        jsp.stats.chi2.cdf(x[0], x[2])
        jsp.stats.expon.logpdf(x[0])
        jsp.stats.expon.ppf(nn.sigmoid(x[0]))
        jsp.stats.laplace.logpdf(*x)
        jsp.stats.laplace.cdf(*x)
        jsp.stats.logistic.logpdf(*x)
        jsp.stats.logistic.ppf(nn.sigmoid(x[0]), *x[1:])
        jsp.stats.cauchy.logpdf(*x)
        jsp.stats.cauchy.ppf(nn.sigmoid(x[0]), *x[1:])
        jsp.stats.gumbel_r.logpdf(*x)
        jsp.stats.gumbel_l.logcdf(*x)
        jsp.stats.pareto.logpdf(x[0] + 3, x[2])
        jsp.stats.t.logpdf(x[0], x[2])
        jsp.stats.truncnorm.logpdf(x[0] / 20, -x[1], x[2])
        jsp.stats.truncnorm.logcdf(x[0] / 20, -x[1], x[2])
        jsp.stats.uniform.logpdf(x[0] / 20, 0.0, x[2])
        jsp.stats.vonmises.logpdf(x[0], x[2])
        jsp.stats.wrapcauchy.logpdf(x[0], x[1])
        jsp.stats.gennorm.logpdf(x[0], x[2])
        jsp.stats.gennorm.cdf(x[0], x[2])
        jsp.stats.poisson.logpmf(3, x[0])
        jsp.stats.poisson.cdf(3, x[0])
        jsp.stats.nbinom.logpmf(3, x[0], x[1])
        jsp.stats.binom.logpmf(2, 5, x[1])
        jsp.stats.betabinom.logpmf(2, 5, x[0], x[2])
        jsp.stats.bernoulli.logpmf(1, x[1])
        jsp.stats.geom.logpmf(3, x[1])
        jsp.stats.dirichlet.logpdf(nn.softmax(x[0]), x[0])
        jsp.stats.multinomial.logpmf(jnp.array([1, 2, 0, 1]), 4, nn.softmax(x[0]))
        """,
    ),
    (
        "jnp.zeros(3)",
        """
        jnp.linalg.norm(x)
        jnp.linalg.norm(x) ** 2
        jnp.hypot(x[0], x[1])
        jnp.arctan2(x[0], x[1])
        jnp.arctan2(x, 1.0)
        jnp.prod(x)
        jnp.cumprod(x)
        jnp.power(x, 2.0)
        jnp.power(x, 2)
        jnp.power(x, 1.0)
        jnp.power(x, 3.0)
        jnp.power(x, 2.5)
        jnp.float_power(x, 3)
        jnp.power(x, jnp.array([1.0, 2.0, 3.0]))
        jnp.power(jnp.exp(x), x)
        lax.pow(x, 2.0)
        lax.integer_pow(x, 2)
        jsp.special.xlogy(x, 2.0)
        jsp.special.xlogy(0.0, 2.0 + x)
        jsp.special.xlog1py(0.0, x)
        jsp.special.xlog1py(x, x)
        jsp.special.kl_div(0.0, 1.0 + x)
        jsp.special.rel_entr(0.0, 1.0 + x)
        jsp.special.logsumexp(x)
        jsp.special.zeta(2.0 + x, 1.0)
        jsp.special.betainc(1.0 + x, 2.0, 0.5)
        jsp.special.gammainc(1.0 + x, 1.0)
        jsp.special.hyp1f1(1.0, 2.0, x)
        jsp.special.hyp2f1(1.0, 2.0, 3.0, x)
        jsp.special.fresnel(x)
        jsp.special.sici(x)[0]
        jsp.special.expn(3, x)
        jsp.special.bessel_jn(x, v=3)
        jsp.special.boxcox(1.0 + x, 0.0)
        jsp.special.owens_t(x, 0.5)
        jsp.special.owens_t(0.5, x)
        jsp.special.poch(1.0 + x, 2.0)
        jnp.sinc(x) ** 2
        jnp.std(x)
        jnp.var(x)
        jnp.max(x)
        jnp.sort(x)
        jnp.median(x)
        jnp.sqrt(x)
        jnp.sqrt(x**2 + 1)
        jnp.abs(x) ** 2
        jnp.logaddexp(x, x)
        jnp.logaddexp(x, 0.0)
        jnp.logaddexp(x, -jnp.inf)
        jnp.logaddexp2(x, -jnp.inf)
        jnp.maximum(x, 0.0)
        jnp.clip(x, 0.0, 1.0)
        jnp.interp(x, jnp.array([-1.0, 0.0, 1.0]), jnp.array([1.0, 0.0, 3.0]))
        jnp.kaiser(5, x[0])
        jnp.fft.fft(x)
        jnp.abs(jnp.fft.fft(x)) ** 2
        jnp.linalg.norm(x, ord=4) ** 4
        nn.softmax(x)
        nn.standardize(x)
        nn.gelu(x)
        nn.logsumexp(jnp.append(x, -jnp.inf))
        nn.softmax(jnp.append(x, -jnp.inf))
        nn.log_softmax(jnp.append(x, -jnp.inf))[:3]
        nn.logsumexp(x, where=jnp.array([True, False, True]))
        nn.log_softmax(x, where=jnp.array([True, False, True]))[0]
        nn.softmax(jnp.where(jnp.array([True, False, True]), x, -jnp.inf))
        lax.cumlogsumexp(x)
        lax.cummax(x)
        lax.top_k(x, 2)[0]
        lax.reduce_prod(x, (0,))
        lax.associative_scan(jnp.multiply, x)
        jax.ops.segment_prod(x, jnp.array([0, 0, 1]), 2)
        x.at[0].power(2.0)
        optax.safe_norm(x, 1e-3)
        optax.global_norm(x)
        optax.losses.cosine_similarity(x, jnp.ones(3), epsilon=1e-3)
        optax.losses.cosine_similarity(x, jnp.ones(3))
        optax.losses.triplet_margin_loss(x, x, jnp.ones(3))
        optax.losses.kl_divergence(x, jnp.array([0.0, 0.4, 0.6]))
        optax.losses.sigmoid_focal_loss(x, jnp.ones(3))
        optax.losses.sigmoid_focal_loss(x - 40, jnp.zeros(3))
        optax.losses.sigmoid_binary_cross_entropy(x, jnp.ones(3))
        optax.losses.safe_softmax_cross_entropy(x, jnp.array([0.0, 0.0, 1.0]))
        jsp.linalg.expm(jnp.diag(x))
        jsp.stats.norm.logpdf(x)
        jsp.stats.t.logpdf(x, 3.0)
        jsp.stats.laplace.logpdf(x)
        jsp.stats.gamma.logpdf(x, 1.0)
        jsp.stats.vonmises.logpdf(x, 1e-8)
        """,
    ),
    (
        "jnp.array([2.0, 0.0, 1.0, 2.0])",
        """
        jnp.prod(x)
        jnp.cumprod(x)
        jnp.nanprod(x)
        jnp.max(x)
        jnp.sort(x)
        jnp.median(x)
        jnp.quantile(x, 0.5)
        jnp.quantile(x, 0.4)
        jnp.ptp(x)
        jnp.linalg.norm(x)
        jnp.linalg.norm(x, ord=1)
        jnp.linalg.norm(x, ord=3)
        jnp.linalg.norm(x, ord=jnp.inf)
        jnp.maximum(x, 2.0)
        jnp.minimum(x, x[::-1])
        jnp.polyval(x, x)
        lax.cummax(x)
        lax.cumprod(x, reverse=True)
        lax.reduce(x, 1.0, lax.mul, (0,))
        lax.reduce_prod(x, (0,))
        lax.associative_scan(jnp.multiply, x)
        lax.top_k(x, 2)[0]
        lax.reduce_window(x, -jnp.inf, lax.max, (2,), (1,), "VALID")
        jax.ops.segment_prod(x, jnp.array([0, 0, 1, 0]), 2)
        jax.ops.segment_max(x, jnp.array([0, 0, 1, 0]), 2)
        x.at[jnp.array([0, 0])].multiply(x[1:3])
        x.at[1].multiply(x[0])
        """,
    ),
    (
        "jnp.array([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [0.5, -1.0, 2.0]])",
        """
        jnp.linalg.det(x)
        jnp.linalg.det(x - x)
        jnp.linalg.det(jnp.outer(x[0], x[2]))
        jnp.linalg.matrix_power(x, 4)
        jnp.linalg.pinv(jnp.outer(x[0], x[2]))
        (jnp.linalg.svdvals(x) ** 2).sum()
        jnp.linalg.norm(x, ord="nuc")
        jnp.linalg.svdvals(x)[:2]
        jnp.linalg.lstsq(x[:, :2], jnp.arange(3.0))[0]
        jnp.linalg.qr(x)[1]
        jsp.linalg.expm(x)
        """,
    ),
    (
        "jnp.eye(3)",
        """
        (jnp.linalg.eigvalsh(x + x.T) ** 2).sum()
        jnp.linalg.eigh(x @ x.T)[0].prod()
        (jnp.linalg.svdvals(x) ** 4).sum()
        jnp.linalg.norm(x, ord="nuc")
        jnp.linalg.norm(x, ord=2)
        jnp.linalg.eigvalsh(x + x.T)
        jnp.linalg.svdvals(x)
        jnp.linalg.slogdet(x)[1]
        jnp.linalg.inv(x)
        jnp.linalg.pinv(x)
        jnp.linalg.cholesky(x @ x.T)
        (jnp.linalg.eigvals(x) ** 2).sum().real
        jsp.linalg.sqrtm(x)
        jsp.linalg.expm(x)
        jsp.linalg.funm(x, jnp.exp)
        jsp.linalg.polar(x)[0]
        jsp.linalg.schur(x)[0]
        jsp.linalg.solve_sylvester(x, x, x)
        lax.linalg.qdwh(x)[0]
        """,
    ),
    (
        "normal(key(0), (3, 3), 'complex128')",
        """
        jnp.prod(x)
        jnp.cumprod(x, axis=0)
        jnp.sum(jnp.abs(x) ** 2)
        jnp.vdot(x, x @ x)
        jnp.var(x)
        jnp.std(x)
        jnp.sort(x)
        jnp.power(x, 2.5)
        jnp.power(x, x)
        jnp.einsum("ij,jk->ik", x, x.conj())
        jnp.fft.fft2(x)
        jnp.fft.ifftn(x)
        jnp.fft.irfft2(x)
        jnp.fft.hfft(x[0])
        jnp.linalg.norm(x)
        jnp.linalg.norm(x, ord=1)
        jnp.linalg.norm(x, ord="nuc")
        jnp.linalg.det(x)
        jnp.linalg.slogdet(x)
        jnp.linalg.inv(x)
        jnp.linalg.pinv(x)
        jnp.linalg.solve(x, jnp.arange(3.0) + 0j)
        jnp.linalg.cholesky(x @ x.conj().T + jnp.eye(3))
        jnp.linalg.eigvals(x)
        jnp.linalg.eigvalsh(x + x.conj().T)
        abs(jnp.linalg.eigh(x + x.conj().T)[1])
        abs(jnp.linalg.svd(x)[0])
        jnp.linalg.svdvals(x)
        jnp.linalg.qr(x)
        jsp.linalg.expm(x)
        jsp.linalg.sqrtm(x)
        jsp.linalg.lu(x)[2]
        jsp.linalg.solve_triangular(x, jnp.ones(3) + 0j, trans=2)
        jsp.special.logsumexp(x)
        lax.linalg.householder_product(x, x[0])
        nn.logsumexp(x, axis=0)
        """,
    ),
    (
        "(normal(key(0), (2, 5, 5)), normal(key(1), (3, 2, 2, 2)))",
        """
        lax.conv(x[0][None], x[1], (1, 1), "VALID")
        lax.conv(x[0][None], x[1], (2, 2), "SAME")
        lax.conv_general_dilated(x[0][None], x[1], (1, 1), ((1, 0), (1, 1)), (2, 1), (1, 2))
        lax.conv_transpose(x[0].T[None], x[1].T, (2, 2), "SAME")
        lax.reduce_window(x[0], 0.0, lax.add, (1, 2, 2), (1, 2, 2), "SAME")
        lax.dot_general(x[0], x[0], (((1,), (2,)), ((0,), (0,))))
        lax.ragged_dot(x[0][0], x[0][:, :, :3], jnp.array([2, 3]))
        jsp.ndimage.map_coordinates(x[0][0], [jnp.array([1.0]), jnp.array([2.0])], 1)
        nn.dot_product_attention(x[0][None], x[0][None] ** 2, x[0][None] + 1)
        nn.dot_product_attention(x[0][:, :, None], x[0][:, :, None], x[0][:, :, None], is_causal=True)
        jsp.signal.convolve(x[0], x[1][0])
        """,
    ),
    ("(eqx.nn.Linear(3, 2, key=key(0)), normal(key(1), (3,)))", "x[0](x[1])"),
    ("(eqx.nn.MLP(3, 2, 4, 2, jnp.tanh, key=key(0)), normal(key(1), (3,)))", "x[0](x[1])"),
    ("(eqx.nn.LayerNorm(4), normal(key(1), (4,)))", "x[0](x[1])"),
    ("(eqx.nn.LayerNorm(4), jnp.zeros(4))", "x[0](x[1])"),
    ("(eqx.nn.RMSNorm(4), normal(key(1), (4,)))", "x[0](x[1])"),
    ("(eqx.nn.RMSNorm(4), jnp.zeros(4))", "x[0](x[1])"),
    ("(eqx.nn.GroupNorm(2, 4), normal(key(1), (4, 3)))", "x[0](x[1])"),
    ("(eqx.nn.GRUCell(2, 3, key=key(0)), normal(key(1), (2,)), normal(key(2), (3,)))", "x[0](*x[1:])"),
    (
        SQUARE,
        "lax.custom_linear_solve(lambda y: x @ y, jnp.ones(3), lambda _, b: jnp.linalg.solve(x, b), "
        "lambda _, b: jnp.linalg.solve(x.T, b))",
    ),
    (
        VECTOR,
        "lax.custom_root(lambda y: y**3 + y - x, 0 * x, lambda f, y: lax.fori_loop(0, 99, "
        "lambda i, y: y - f(y) / (3 * y**2 + 1), y), lambda g, y: y / g(jnp.ones(5)))",
    ),
    *(
        (
            "(normal(key(0), (5, 3)), normal(key(1), (2, 3)))",
            f"lax.{scatter}(x[0], jnp.array({index}), x[1], lax.ScatterDimensionNumbers((1,), (0,), (0,)))",
        )
        for scatter in ("scatter", "scatter_add", "scatter_sub", "scatter_mul", "scatter_min", "scatter_max")
        for index in ([[1], [3]], [[1], [1]])
    ),
    (
        "(normal(key(0), (5, 3)), normal(key(1), (2, 3)))",
        "x[0].at[jnp.array([1, 3])].multiply(x[1], unique_indices=True)",
    ),
    (
        "(normal(key(0), (2, 4, 4)), jnp.array([0.8, 1.1]), jnp.array([0.2, 0.3]))",
        'jax.image.scale_and_translate(x[0], (2, 4, 4), (1, 2), *x[1:], "linear")',
    ),
    (
        "(normal(key(0), (1, 2, 4, 4)), normal(key(1), (2, 8, 3, 3)))",
        'lax.conv_general_dilated_local(*x, (1, 1), "VALID", (2, 2))',
    ),
    (
        "(normal(key(0), (5, 5)), jnp.array([0.3, 2.6, 5.7]), jnp.array([1.2, 3.9, -0.8]))",
        """
        jsp.ndimage.map_coordinates(x[0], x[1:], 1)
        jsp.ndimage.map_coordinates(x[0], x[1:], 1, "wrap")
        jsp.ndimage.map_coordinates(x[0], x[1:], 1, "mirror")
        jsp.ndimage.map_coordinates(x[0], x[1:], 0, "nearest")
        """,
    ),
    (
        "(eqx.nn.LSTMCell(2, 3, key=key(0)), normal(key(1), (2,)), normal(key(2), (2, 3)))",
        "x[0](x[1], tuple(x[2]))",
    ),
    ("(eqx.nn.Conv2d(2, 2, 2, key=key(0)), normal(key(1), (2, 3, 3)))", "x[0](x[1])"),
    ("(eqx.nn.Conv1d(2, 2, 3, padding='SAME', key=key(0)), normal(key(1), (2, 4)))", "x[0](x[1])"),
    ("(eqx.nn.ConvTranspose2d(2, 2, 2, stride=2, key=key(0)), normal(key(1), (2, 2, 3)))", "x[0](x[1])"),
    ("(eqx.nn.MultiheadAttention(2, 4, key=key(0)), normal(key(1), (3, 4)))", "x[0](x[1], x[1], x[1] ** 2)"),
    ("(eqx.nn.PReLU(0.3), normal(key(1), (4,)))", "x[0](x[1])"),
    ("(eqx.nn.Embedding(4, 2, key=key(0)),)", "x[0](jnp.array(2)) ** 2"),
    (
        "normal(key(1), (2, 4, 4))",
        "eqx.nn.AvgPool2d(2)(x)\neqx.nn.MaxPool2d(2)(x)\neqx.nn.AdaptiveAvgPool2d(3)(x)",
    ),
    ("normal(key(1), (4, 4))", "eqx.nn.RotaryPositionalEmbedding(4)(x)"),
    ("(eqx.nn.WeightNorm(eqx.nn.Linear(3, 2, key=key(0))), normal(key(1), (3,)))", "x[0](x[1])"),
]
