from gradlab.transforms.distributed._torch_group import sharded
from gradlab.transforms.distributed.shards import Operations

_operations = Operations(sharded)
hvp = _operations.hvp
ggn_vp = _operations.ggn_vp
per_example_norms = _operations.per_example_norms
clipped_grad = _operations.clipped_grad
per_example_statistics = _operations.per_example_statistics
gradient_noise_scale = _operations.gradient_noise_scale
