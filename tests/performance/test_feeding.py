"""How fast images come, and whether a device waits for them."""

import pytest

from ur_jax import data
from ur_jax.errors import UserError
from ur_jax.performance import feeding


def test_a_slow_device_waits_for_nothing_and_a_fast_one_for_its_images():
    source = data.open_images("demo")
    how = {"input_size": (32, 32), "num_images": 64, "batch_size": 16}
    assert feeding.rate(source, **how).core > 0
    slow, fast = (feeding.busy(source, device_rate=rate, **how) for rate in (100, 1e7))
    assert fast < slow <= 1
    with pytest.raises(UserError, match="device_rate > 0 images/s, got 0"):
        feeding.busy(source, device_rate=0, **how)
    with pytest.raises(UserError, match="more images than one batch of 64, got 64"):
        feeding.busy(source, device_rate=1, **{**how, "batch_size": 64})
