"""The product that starts from what is there: the same numbers, and nobody's tensor changed behind their back."""

import pytest
import torch

from moa.product import plus_product


def drawn(*shapes, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


SHAPES = [
    ((2, 5, 6), (2, 5, 3), (3, 6)),
    ((4, 6), (4, 3), (3, 6)),
    ((2, 5, 6), (2, 5, 3), (2, 3, 6)),
]


@pytest.mark.parametrize("shapes", SHAPES)
def test_it_is_the_sum_and_takes_no_new_memory_without_gradients(shapes):
    onto, left, right = drawn(*shapes)
    expected, place = onto.double() + left.double() @ right.double(), onto.data_ptr()
    got = plus_product(onto, left, right)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    assert got.data_ptr() == place


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("wants", range(3))
def test_where_a_gradient_is_wanted_it_is_that_of_the_sum_and_nothing_changes(shapes, wants):
    tensors = [x.requires_grad_(place == wants) for place, x in enumerate(drawn(*shapes))]
    before = tensors[0].detach().clone()
    plus_product(*tensors).square().sum().backward()
    assert torch.equal(tensors[0].detach(), before)
    got = tensors[wants].grad
    tensors = [x.detach().double().requires_grad_(place == wants) for place, x in enumerate(tensors)]
    (tensors[0] + tensors[1] @ tensors[2]).square().sum().backward()
    torch.testing.assert_close(got.double(), tensors[wants].grad, rtol=1e-4, atol=1e-4)


def test_a_base_in_half_precision_and_rows_that_are_not_contiguous_are_left_as_they_are():
    onto, left, right = drawn((4, 6), (4, 3), (3, 6))
    for kept in (onto.bfloat16(), onto.T.contiguous().T):
        before = kept.clone()
        got = plus_product(kept, left, right)
        assert torch.equal(kept, before) and got.dtype == torch.float32
        torch.testing.assert_close(got, before + left @ right)
