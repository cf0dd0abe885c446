"""Numbers as a user reads them."""

from __future__ import annotations

import pytest

from common.system.units import figure


@pytest.mark.parametrize(
    ("value", "digits", "said"),
    [
        (0.12345, 3, "0.123"),
        (16.42, 3, "16.4"),
        (999.4, 3, "999"),
        (999.5, 3, "1000"),
        (3904.2, 3, "3904"),
        (-3904.2, 3, "-3904"),
        (1234.56, 4, "1235"),
        (12345.6, 4, "12346"),
        (0, 3, "0"),
    ],
)
def test_a_figure_has_no_exponent_where_it_is_large(value: float, digits: int, said: str) -> None:
    assert figure(value, digits) == said
