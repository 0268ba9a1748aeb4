"""Runge-Kutta methods as data, of which both frameworks make their solvers.

Stage i is kᵢ = f(t + cᵢ h, y + h Σⱼ aᵢⱼ kⱼ), and the step y + h Σᵢ bᵢ kᵢ. The last row of `a` is b: every method
ends with the slope at the end of its step, which is the first stage of the next step. Within the step,
y(t + θ h) = y + h Σⱼ θʲ⁺¹ Σᵢ denseⱼᵢ kᵢ. Numbers are those of the papers, in the digits in which they were published.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from gradlab.transforms.odes.rosenbrock import RODAS5P, Rosenbrock

Row = tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Tableau:
    """One method.

    Attributes:
        order: The error of a step is O(h^(order + 1)).
        error_order: The same of the embedded method, by whose difference from b a step is judged.
        dense_order: The same of the polynomial within the step.
        diagonal: The entry aᵢᵢ of every stage but the first, of an implicit method.
        embedded: The weights of the embedded method; None where steps can only be fixed.
        guesses: Of each stage, weights of the stages before it that predict its slope (implicit methods).
    """

    name: str
    order: int
    c: Row
    a: tuple[Row, ...]
    dense_order: int
    dense: tuple[Row, ...]
    error_order: int = 0
    embedded: Row | None = None
    diagonal: float = 0.0
    guesses: tuple[Row, ...] = ()

    @property
    def stages(self) -> int:
        """Of which the first is the last of the step before."""
        return len(self.c)

    @property
    def implicit(self) -> bool:
        """Whether each stage is an equation."""
        return self.diagonal != 0

    @cached_property
    def b(self) -> Row:
        """The weights of the step."""
        last = (*self.a[-1], self.diagonal)
        return last

    @cached_property
    def error(self) -> Row | None:
        """The weights of the difference from the embedded method."""
        if self.embedded is None:
            return None
        return tuple(b - e for b, e in zip(self.b, self.embedded, strict=True))


def hermite(b: Row) -> tuple[Row, ...]:
    """The cubic with the values and slopes at both ends of a step."""
    n = len(b)
    first, last = unit(0, n), unit(n - 1, n)
    return (
        first,
        combined((3, b), (-2, first), (-1, last)),
        combined((-2, b), (1, first), (1, last)),
    )


def through(middle: Row, b: Row) -> tuple[Row, ...]:
    """The quartic that has the same, and at θ = 1/2 the value y + h Σᵢ middleᵢ kᵢ."""
    n = len(b)
    first, last = unit(0, n), unit(n - 1, n)
    return (
        first,
        combined((16, middle), (-5, b), (-4, first), (1, last)),
        combined((-32, middle), (14, b), (5, first), (-3, last)),
        combined((16, middle), (-8, b), (-2, first), (2, last)),
    )


def unit(i: int, n: int) -> Row:
    """The weights of stage i alone."""
    return tuple(float(i == j) for j in range(n))


def combined(*terms: tuple[float, Row]) -> Row:
    """A linear combination of rows."""
    return tuple(
        sum(w * x for (w, _), x in zip(terms, xs, strict=True))
        for xs in zip(*(r for _, r in terms), strict=True)
    )


def powers(*polynomials: Sequence[Sequence[float]]) -> tuple[Row, ...]:
    """Of each stage a product of polynomials in θ, lowest power first: the rows of its powers from the first on."""
    columns = []
    for factors in polynomials:
        product = [1.0]
        for factor in factors:
            longer = [0.0] * (len(product) + len(factor) - 1)
            for i, x in enumerate(product):
                for j, y in enumerate(factor):
                    longer[i + j] += x * y
            product = longer
        columns.append(product[1:])
    return tuple(zip(*columns, strict=True))


EULER = Tableau("euler", order=1, c=(0, 1), a=((), (1,)), dense_order=1, dense=((1, 0),))

# Runge, Ueber die numerische Auflösung von Differentialgleichungen, Math. Ann. 46 (1895), doi:10.1007/BF01446807.
MIDPOINT = Tableau(
    "midpoint",
    order=2,
    error_order=1,
    c=(0, 1 / 2, 1),
    a=((), (1 / 2,), (0, 1)),
    embedded=(1, 0, 0),
    dense_order=2,
    dense=hermite((0, 1, 0)),
)

# Kutta, Beitrag zur näherungsweisen Integration totaler Differentialgleichungen, Z. Math. Phys. 46 (1901).
RK4 = Tableau(
    "rk4",
    order=4,
    c=(0, 1 / 2, 1 / 2, 1, 1),
    a=((), (1 / 2,), (0, 1 / 2), (0, 0, 1), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
    dense_order=3,
    dense=hermite((1 / 6, 1 / 3, 1 / 3, 1 / 6, 0)),
)

# Bogacki and Shampine, A 3(2) pair of Runge-Kutta formulas, Appl. Math. Lett. 2 (1989),
# doi:10.1016/0893-9659(89)90079-7.
BOSH3 = Tableau(
    "bosh3",
    order=3,
    error_order=2,
    c=(0, 1 / 2, 3 / 4, 1),
    a=((), (1 / 2,), (0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    embedded=(7 / 24, 1 / 4, 1 / 3, 1 / 8),
    dense_order=3,
    dense=hermite((2 / 9, 1 / 3, 4 / 9, 0)),
)

# Dormand and Prince, A family of embedded Runge-Kutta formulae, J. Comput. Appl. Math. 6 (1980),
# doi:10.1016/0771-050X(80)90013-3, with the embedded weights and the middle of Shampine, Some practical
# Runge-Kutta formulas, Math. Comp. 46 (1986), doi:10.2307/2008219.
_DOPRI5 = (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)
DOPRI5 = Tableau(
    "dopri5",
    order=5,
    error_order=4,
    c=(0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1),
    a=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        _DOPRI5,
    ),
    embedded=(1951 / 21600, 0, 22642 / 50085, 451 / 720, -12231 / 42400, 649 / 6300, 1 / 60),
    dense_order=4,
    dense=through(
        (
            6025192743 / 30085553152 / 2,
            0,
            51252292925 / 65400821598 / 2,
            -2691868925 / 45128329728 / 2,
            187940372067 / 1594534317056 / 2,
            -1776094331 / 19743644256 / 2,
            11237099 / 235043384 / 2,
        ),
        (*_DOPRI5, 0),
    ),
)

# Tsitouras, Runge-Kutta pairs of order 5(4) satisfying only the first column simplifying assumption, Comput. Math.
# Appl. 62 (2011), doi:10.1016/j.camwa.2011.06.002.
TSIT5 = Tableau(
    "tsit5",
    order=5,
    error_order=4,
    c=(0, 0.161, 0.327, 0.9, 0.9800255409045097, 1, 1),
    a=(
        (),
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
        (
            5.861455442946420,
            -12.92096931784711,
            8.159367898576159,
            -0.07158497328140100,
            -0.02826905039406838,
        ),
        (
            0.09646076681806523,
            0.01,
            0.4798896504144996,
            1.379008574103742,
            -3.290069515436081,
            2.324710524099774,
        ),
    ),
    embedded=(
        0.09468075576583945,
        0.009183565540343254,
        0.4877705284247616,
        1.234297566930479,
        -2.707712349983526,
        1.866628418170587,
        1 / 66,
    ),
    dense_order=4,
    dense=powers(
        (
            (0, -1.0530884977290216),
            (-1.3299890189751412, 1),
            (0.7139816917074209, -1.4364028541716351, 1),
        ),
        ((0, 0, 0.1017), (1.2949852507374631, -2.1966568338249754, 1)),
        ((0, 0, 2.490627285651252793), (1.57803468208092486, -2.38535645472061657, 1)),
        ((0, 0, -16.54810288924490272), (-1.21712927295533244, 1), (-0.61620406037800089, 1)),
        ((0, 0, 47.37952196281928122), (-1.203071208372362603, 1), (-0.658047292653547382, 1)),
        ((0, 0, -34.87065786149660974), (-1.2, 1), (-0.666666666666666667, 1)),
        ((0, 0, 2.5), (-1, 1), (-0.6, 1)),
    ),
)

# Prince and Dormand, High order embedded Runge-Kutta formulae, J. Comput. Appl. Math. 7 (1981),
# doi:10.1016/0771-050X(81)90010-3; within the step, Bogacki and Shampine, Interpolating high-order Runge-Kutta
# formulas, Comput. Math. Appl. 20 (1990), doi:10.1016/0898-1221(90)90027-H.
DOPRI8 = Tableau(
    "dopri8",
    order=8,
    error_order=7,
    dense_order=5,
    c=(
        0,
        1 / 18,
        1 / 12,
        1 / 8,
        5 / 16,
        3 / 8,
        59 / 400,
        93 / 200,
        5490023248 / 9719169821,
        13 / 20,
        1201146811 / 1299019798,
        1,
        1,
        1,
    ),
    a=(
        (),
        (1 / 18,),
        (1 / 48, 1 / 16),
        (1 / 32, 0, 3 / 32),
        (5 / 16, 0, -75 / 64, 75 / 64),
        (3 / 80, 0, 0, 3 / 16, 3 / 20),
        (29443841 / 614563906, 0, 0, 77736538 / 692538347, -28693883 / 1125000000, 23124283 / 1800000000),
        (
            16016141 / 946692911,
            0,
            0,
            61564180 / 158732637,
            22789713 / 633445777,
            545815736 / 2771057229,
            -180193667 / 1043307555,
        ),
        (
            39632708 / 573591083,
            0,
            0,
            -433636366 / 683701615,
            -421739975 / 2616292301,
            100302831 / 723423059,
            790204164 / 839813087,
            800635310 / 3783071287,
        ),
        (
            246121993 / 1340847787,
            0,
            0,
            -37695042795 / 15268766246,
            -309121744 / 1061227803,
            -12992083 / 490766935,
            6005943493 / 2108947869,
            393006217 / 1396673457,
            123872331 / 1001029789,
        ),
        (
            -1028468189 / 846180014,
            0,
            0,
            8478235783 / 508512852,
            1311729495 / 1432422823,
            -10304129995 / 1701304382,
            -48777925059 / 3047939560,
            15336726248 / 1032824649,
            -45442868181 / 3398467696,
            3065993473 / 597172653,
        ),
        (
            185892177 / 718116043,
            0,
            0,
            -3185094517 / 667107341,
            -477755414 / 1098053517,
            -703635378 / 230739211,
            5731566787 / 1027545527,
            5232866602 / 850066563,
            -4093664535 / 808688257,
            3962137247 / 1805957418,
            65686358 / 487910083,
        ),
        (
            403863854 / 491063109,
            0,
            0,
            -5068492393 / 434740067,
            -411421997 / 543043805,
            652783627 / 914296604,
            11173962825 / 925320556,
            -13158990841 / 6184727034,
            3936647629 / 1978049680,
            -160528059 / 685178525,
            248638103 / 1413531060,
            0,
        ),
        (
            14005451 / 335480064,
            0,
            0,
            0,
            0,
            -59238493 / 1068277825,
            181606767 / 758867731,
            561292985 / 797845732,
            -1041891430 / 1371343529,
            760417239 / 1151165299,
            118820643 / 751138087,
            -528747749 / 2220607170,
            1 / 4,
        ),
    ),
    embedded=(
        13451932 / 455176623,
        0,
        0,
        0,
        0,
        -808719846 / 976000145,
        1757004468 / 5645159321,
        656045339 / 265891186,
        -3867574721 / 1518517206,
        465885868 / 322736535,
        53011238 / 667516719,
        2 / 45,
        0,
        0,
    ),
    dense=(
        (1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
        (
            -6.6910181737837595697,
            0,
            0,
            0,
            0,
            -7.6142658045872677172,
            10.7281392630428866124,
            0.5526637063753648783,
            4.2186562625665153803,
            -0.6627209125361597559,
            -1.2636789001135462218,
            5.4106037898590422230,
            -7.0321379067945741781,
            2.3537586759714983486,
        ),
        (
            19.9990069333683970610,
            0,
            0,
            0,
            0,
            52.2273532792945524050,
            -46.8919164181093621583,
            -0.1890893225010595467,
            -35.7075975946222072821,
            6.2736448083240352160,
            10.3160881272450748458,
            -34.7650769866611817349,
            47.7457971078225540396,
            -19.0082099341608028453,
        ),
        (
            -30.0610568289666450593,
            0,
            0,
            0,
            0,
            -121.4999627731334642623,
            83.1721004639847717481,
            9.5724507555993664382,
            87.8406057677205645007,
            -17.4152107770762969005,
            -28.5903289514790976966,
            81.6630950584341412934,
            -114.9375291377009418170,
            50.2558364226176017553,
        ),
        (
            22.1396504998094068976,
            0,
            0,
            0,
            0,
            116.4422149550342161651,
            -67.1451318825957197185,
            -16.5672243527496524646,
            -89.9916014847245016028,
            22.6237489648532849093,
            32.2362340167355370113,
            -82.1020315488359848644,
            116.2662185791119533462,
            -53.9020777466385396792,
        ),
        (
            -6.3448349392860401388,
            0,
            0,
            0,
            0,
            -39.6107919852202505218,
            20.3761213808791436958,
            7.3347098826795362023,
            32.8801774352459155182,
            -10.1588990526426760954,
            -12.5401268098782561200,
            29.5553001484516038033,
            -41.7923486424390588923,
            20.3006925822100825485,
        ),
    ),
)

# Kværnø, Singly diagonally implicit Runge-Kutta methods with an explicit first stage, BIT 44 (2004),
# doi:10.1023/B:BITN.0000046811.70614.38.
_G = 0.43586652150
_KVAERNO3 = (
    (-4 * _G**2 + 6 * _G - 1) / (4 * _G),
    (-2 * _G + 1) / (4 * _G),
    (6 * _G - 1) / (12 * _G),
    -1 / ((24 * _G - 12) * _G),
    (-6 * _G**2 + 6 * _G - 1) / (6 * _G - 3),
)
KVAERNO3 = Tableau(
    "kvaerno3",
    order=3,
    error_order=2,
    diagonal=_G,
    c=(0, 2 * _G, 1, 1),
    a=((), (_G,), _KVAERNO3[:2], _KVAERNO3[2:]),
    embedded=(*_KVAERNO3[:2], _G, 0),
    guesses=((), (1,), (1 - 1 / (2 * _G), 1 / (2 * _G)), (*_KVAERNO3[:2], _G)),
    dense_order=3,
    dense=hermite((*_KVAERNO3[2:], _G)),
)

# The polynomial is the cubic through both ends with their slopes: the stages are of order 2 themselves, so that one
# made of all of them (of order 4 where nothing is stiff) is ten times as far off where an equation is stiff.
_KVAERNO5 = (
    (0.13855640231268224, 0, -0.04245337201752043, 0.02446657898003141, 0.61943039072480676),
    (
        0.13659751177640291,
        0,
        -0.05496908796538376,
        -0.04118626728321046,
        0.62993304899016403,
        0.06962479448202728,
    ),
)
KVAERNO5 = Tableau(
    "kvaerno5",
    order=5,
    error_order=4,
    diagonal=0.26,
    c=(0, 0.52, 1.230333209967908, 0.8957659843500759, 0.43639360985864756, 1, 1),
    a=(
        (),
        (0.26,),
        (0.13, 0.84033320996790809),
        (0.22371961478320505, 0.47675532319799699, -0.06470895363112615),
        (0.16648564323248321, 0.10450018841591720, 0.03631482272098715, -0.13090704451073998),
        *_KVAERNO5,
    ),
    embedded=(*_KVAERNO5[0], 0.26, 0),
    guesses=(
        (),
        (1,),
        (-1.366025403784441, 2.3660254037844357),
        (-0.19650552613122207, 0.8113579546496623, 0.38514757148155954),
        (0.10375304369958693, 0.937994698066431, -0.04174774176601781, 0),
        (-0.17281112873898072, 0.6235784481025847, 0.5492326806363959, 0, 0),
        (*_KVAERNO5[0], 0.26),
    ),
    dense_order=3,
    dense=hermite((*_KVAERNO5[1], 0.26)),
)

METHODS: dict[str, Tableau | Rosenbrock] = {
    tableau.name: tableau
    for tableau in (EULER, MIDPOINT, BOSH3, RK4, DOPRI5, TSIT5, DOPRI8, KVAERNO3, KVAERNO5, RODAS5P)
}
