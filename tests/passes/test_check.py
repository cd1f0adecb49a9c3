"""What passes leave is what they were given: to the bit on a CPU, to the rounding on a GPU."""

import pytest
import torch

from eepass.errors import PassError
from eepass.passes.split.check import refuse_difference


@pytest.mark.parametrize("on_gpu", (False, True))
def test_how_far_apart_results_may_be(monkeypatch, on_gpu):
    expected = {"logits": torch.linspace(-1, 1, 64).bfloat16(), "tokens": torch.arange(4)}
    moved = torch.zeros(64).bfloat16()
    moved[7] = 0.03
    monkeypatch.setattr(torch.Tensor, "is_cuda", on_gpu)
    refuse_difference(expected, expected)
    found = {**expected, "logits": expected["logits"] + moved}
    if on_gpu:
        refuse_difference(found, expected)
    else:
        with pytest.raises(PassError, match="other logits"):
            refuse_difference(found, expected)
    # a mistake is one on every device, in whole numbers too
    for name, wrong in (("logits", -expected["logits"]), ("tokens", torch.arange(1, 5))):
        with pytest.raises(PassError, match="the split decoder"):
            refuse_difference({**expected, name: wrong}, expected)
