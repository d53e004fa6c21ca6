"""A vote tells what any rank has given, in rounds."""

import pytest
import torch.distributed as dist

from vaedist.world import RANKS_A_STEP, Vote, World


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(("ranks", "length"), [(2, 1), (RANKS_A_STEP, 1), (RANKS_A_STEP + 1, 2), (40, 3)])
def test_a_number_of_any_call_of_a_round_is_told_once_at_the_end_of_the_next(ranks, length):
    for call in range(length):
        vote = Vote(World(0, ranks))
        told = [vote(7 if number == call else 0) for number in range(3 * length)]
        assert told == [7 if number == 2 * length - 1 else 0 for number in range(3 * length)]
        vote.close()


def test_one_rank_is_told_its_own_number_at_once():
    assert [Vote(World())(number) for number in (0, 7)] == [0, 7]
