"""For pytest: every test with kernels that are computed on the CPU."""

import pytest
from arithmetic import OnTheCPU


@pytest.fixture(autouse=True)
def kernels_are_computed_on_the_cpu():
    with OnTheCPU():
        yield
