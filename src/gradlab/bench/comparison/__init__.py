"""JAX against PyTorch on facts: the same models from the same weights on the same data, each framework in its process.

`data.py` has the tasks; `_models_<framework>.py` the models and `_<framework>.py` their training, as users of each
framework write them; `worker.py` a process with one of them, `crew.py` all of them asked in turn; `agreement.py` the
condition for any time to be taken. `experiments/framework_comparison.py` runs it.
"""

from gradlab.bench.comparison.agreement import Disagreement
from gradlab.bench.comparison.data import TASKS, Optimiser, Task

__all__ = ["TASKS", "Disagreement", "Optimiser", "Task"]
