"""What tests in more than one folder share."""

import pytest
from fake_bench import FakeBench


@pytest.fixture
def fake_bench():
    return FakeBench()
