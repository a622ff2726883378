import pytest

from hbp_tune.errors import ConfigError
from hbp_tune.planning.costs.measurements import Measurement
from hbp_tune.planning.plans.records import PackingGroup

GROUP = PackingGroup(name="long", pack_len=64, cp_degree=2)


def test_a_measurement_counts_its_documents_and_shares_time_over_ranks() -> None:
    measured = Measurement(group=GROUP, world_size=4, doc_lens=(30, 10), micro_step_s=0.5, peak_gib=1.0)
    assert (measured.tokens, measured.squares, measured.s_per_token) == (40, 1000, 0.025)
    assert measured.fits


def test_what_does_not_fit_has_no_time() -> None:
    measured = Measurement(group=GROUP, world_size=4, doc_lens=(64,), micro_step_s=None, peak_gib=None)
    assert not measured.fits
    assert measured.s_per_token == float("inf")


@pytest.mark.parametrize("doc_lens", [(), (65,)])
def test_documents_fit_into_the_pack(doc_lens: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=rf"measured pack of {sum(doc_lens)} tokens must have 1 to pack_len=64"):
        Measurement(group=GROUP, world_size=4, doc_lens=doc_lens, micro_step_s=1.0, peak_gib=1.0)


def test_time_and_memory_come_together() -> None:
    with pytest.raises(ConfigError, match="'long': micro_step_s and peak_gib must both be there, or neither"):
        Measurement(group=GROUP, world_size=4, doc_lens=(8,), micro_step_s=1.0, peak_gib=None)
