"""What is found by name."""

import pytest

from rlloop.errors import ConfigError
from rlloop.plugins import check_installed


def test_missing_packages_are_named_with_the_extra_that_brings_them() -> None:
    check_installed("json", "rlloop")
    with pytest.raises(ConfigError, match=r"^no_such_engine cannot be found: pip install 'rlloop\[gpu\]', or"):
        check_installed("json", "no_such_engine")
