import numpy as np
import pytest


@pytest.fixture
def pixels() -> np.ndarray:
    """Random images `[7, 4, 5, 3]`."""
    return np.random.default_rng(0).integers(0, 256, size=(7, 4, 5, 3), dtype=np.uint8)
