import pytest

from hbp_tune.components.planning.errors import ConfigError
from hbp_tune.components.planning.records import PackingGroup, check_groups


def test_a_group_is_valid_once_it_exists() -> None:
    group = PackingGroup(name="long", pack_len=131072, cp_degree=8, ac_layers=29)
    assert (group.pack_len, group.cp_degree, group.ac_layers) == (131072, 8, 29)
    assert PackingGroup(name="short", pack_len=16).cp_degree == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pack_len": 100, "cp_degree": 8}, r"group 'g': pack_len=100 must be a multiple of 2 \* cp_degree=16; round it up"),
        ({"pack_len": 0}, r"group 'g': pack_len=0 must be a whole number of at least 2"),
        ({"pack_len": 64.0}, r"pack_len=64.0 must be a whole number"),
        ({"pack_len": "64"}, r"pack_len='64' must be a whole number"),
        ({"pack_len": 64, "cp_degree": 0}, r"cp_degree=0 must be a whole number of at least 1"),
        ({"pack_len": 64, "ac_layers": -1}, r"ac_layers=-1 must be a whole number of at least 0"),
    ],
)
def test_a_group_that_cannot_work(values: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PackingGroup(name="g", **values)


def groups(*parts: tuple[str, int, int]) -> list[PackingGroup]:
    return [PackingGroup(name=name, pack_len=pack_len, cp_degree=cp) for name, pack_len, cp in parts]


@pytest.mark.parametrize(
    ("parts", "world_size", "message"),
    [
        ([], 2, r"groups is empty"),
        ([("a", 64, 1), ("a", 128, 1)], 2, r"groups \['a', 'a'\] must have different names"),
        ([("a", 128, 1), ("b", 64, 1)], 2, r"group 'b' has pack_len=64, not more than 128 of 'a' before it"),
        ([("a", 64, 1), ("b", 64, 1)], 2, r"group 'b' has pack_len=64, not more than 64"),
        ([("a", 64, 4)], 2, r"world size 2 is not a multiple of cp_degree=4 of group 'a'; start a multiple of 4 ranks"),
        ([("a", 48, 3)], 8, r"world size 8 is not a multiple of cp_degree=3"),
    ],
)
def test_groups_that_do_not_fit_together(parts: list[tuple[str, int, int]], world_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_groups(groups(*parts), world_size)


def test_groups_that_fit() -> None:
    check_groups(groups(("a", 64, 1), ("b", 128, 2), ("c", 256, 2)), 8)
