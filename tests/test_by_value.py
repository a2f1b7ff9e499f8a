"""Structs by value lie as C lays them out."""

import ctypes
import struct

import pytest
import torch

from dsv3_kernels.by_value import Struct, join


class Inner(ctypes.Structure):
    _fields_ = [("p", ctypes.c_void_p), ("a", ctypes.c_uint32), ("q", ctypes.c_int64), ("b", ctypes.c_uint32)]


class Outer(ctypes.Structure):
    _fields_ = [("first", Inner), ("second", Inner), ("last", ctypes.c_uint32), ("null", ctypes.c_void_p)]


def test_fields_and_padding_are_those_of_c():
    tensor = torch.zeros(4)
    address = {id(tensor): 1 << 40}
    inner = Struct("PIqI", tensor, 7, -5, 9)
    whole = join([inner, Struct("PIqI", None, 1, 2, 3), Struct("IP", 4, None)])
    expected = Outer(Inner(1 << 40, 7, -5, 9), Inner(None, 1, 2, 3), 4, None)
    assert whole.encode(lambda t: address[id(t)]) == bytes(expected)
    assert whole.tensors == [tensor]


def test_an_array_ends_in_zeros():
    inner = Struct("PIqI", 1, 2, 3, 4)
    data = join([inner], 3).encode(torch.Tensor.data_ptr)
    assert data == bytes(Inner(1, 2, 3, 4)).ljust(3 * ctypes.sizeof(Inner), b"\0")


def test_a_number_that_does_not_fit_is_refused():
    with pytest.raises(struct.error):
        Struct("I", 1 << 32).encode(torch.Tensor.data_ptr)
