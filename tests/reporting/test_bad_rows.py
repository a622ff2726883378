import pytest

from hbp_tune.reporting.terminal.bad_rows import kind_of_reason


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("broken JSON: Expecting value: line 1 column 12 (char 11)", "broken JSON: Expecting value: line # column # (char #)"),
        ("broken UTF-8: invalid start byte at 12", "broken UTF-8: invalid start byte at #"),
        ("no messages", "no messages"),
    ],
)
def test_rows_of_one_kind_differ_in_their_own_numbers_only(reason: str, kind: str) -> None:
    assert kind_of_reason(reason) == kind
