"""A torch model exported by torch.onnx gives in onnxruntime what it gives in torch, and in jax."""

import io

import numpy as np
import pytest

torch = pytest.importorskip("torch")
for needed in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(needed, reason="pip install 'gradlab[onnx]'")
jax = pytest.importorskip("jax")

import onnxruntime  # noqa: E402

from gradlab import interop  # noqa: E402
from test_interop_weights import Decoder, TorchDecoder, conv_nets, decoder_names, mlps  # noqa: E402


class Batched(torch.nn.Module):
    """The decoder, one sequence at a time."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return torch.stack([self.model(t) for t in tokens.unbind()])


def models():
    ours, theirs, options, _ = mlps()
    yield "mlp", ours, theirs, options, torch.randn(4, 3)
    ours, theirs, options, _ = conv_nets()
    theirs[4] = torch.nn.Flatten(1)
    yield "conv net", ours, theirs, options, torch.randn(4, 1, 8, 8)
    tokens = torch.randint(0, 11, (2, 5))
    yield "decoder", Decoder(jax.random.key(0)), TorchDecoder(), {"rename": decoder_names}, tokens


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("number", range(3), ids=["mlp", "conv net", "decoder"])
def test_exported(number):
    torch.manual_seed(0)
    _, ours, theirs, options, x = list(models())[number]
    theirs.eval()
    ours = interop.to_equinox(ours, theirs.state_dict(), **options)
    model = Batched(theirs) if number == 2 else theirs
    file = io.BytesIO()
    torch.onnx.export(model, (x,), dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, model(x).detach(), atol=1e-5)
    np.testing.assert_allclose(found, jax.vmap(ours)(interop.to_jax(x)), atol=1e-5)
