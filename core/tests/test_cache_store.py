"""The tensors behind the blocks: zeros that overlap nowhere, a block of all layers of a group in one place."""

import torch

from bestiary.blocks import Latent, PagedKV, State
from bestiary.cache import CacheGroup, store
from bestiary.model import kinds

CPU = torch.device("cpu")
KEPT = [
    PagedKV(2, 24, 40),
    PagedKV(1, 8, 8, window=32),
    State(((3, 5), (7,)), (False, True)),
    Latent(19),
    PagedKV(2, 24, 40),
]


def test_tensors_are_zeros_of_their_own() -> None:
    found = kinds(KEPT)
    groups = [CacheGroup(3 + g, *kind) for g, kind in enumerate(found)]
    caches = store.allocate(KEPT, found, groups, 16, torch.bfloat16, CPU)
    every = [tensor for tensors in caches for tensor in tensors]
    assert [tuple(t.shape) for t in caches[0]] == [(3, 2, 16, 24), (3, 2, 16, 40)]
    assert [tuple(t.shape) for t in caches[2]] == [(5, 3, 5), (5, 7)]
    assert [t.dtype for t in caches[2]] == [torch.bfloat16, torch.float32]
    assert not any(bool(tensor.any()) for tensor in every)
    for number, tensor in enumerate(every, 1):
        tensor.fill_(number)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(every, 1))


def test_a_block_of_all_layers_is_in_one_place_and_states_are_dense() -> None:
    found = kinds(KEPT)
    caches = store.allocate(KEPT, found, [CacheGroup(4, *kind) for kind in found], 16, torch.bfloat16, CPU)
    whole = [*caches[0], *caches[3], *caches[4]]  # all see all tokens
    size = sum(-(-tensor[0].nbytes // 64) * 64 for tensor in whole)  # in whole lines of memory
    assert {tensor.stride(0) * tensor.itemsize for tensor in whole} == {size}
    places = [tensor.data_ptr() for tensor in whole]
    assert places == sorted(places) and places[-1] - places[0] < size
    assert all(tensor[0].is_contiguous() and tensor.data_ptr() % 64 == 0 for tensor in whole)
    assert all(tensor.is_contiguous() for tensor in caches[2])
