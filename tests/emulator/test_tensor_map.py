"""Boxes of tensor maps against indexing in numpy."""

import re

import numpy as np
import pytest

from dsv3_kernels import _emulator

leaves = _emulator.leaves
RawTensorMap = leaves.RawTensorMap

TYPES = {
    "u8": (0, np.uint8), "u16": (1, np.uint16), "u32": (2, np.uint32), "s32": (3, np.int32),
    "u64": (4, np.uint64), "s64": (5, np.int64), "f16": (6, np.uint16), "f32": (7, np.float32),
    "f32_ftz": (8, np.float32), "f64": (9, np.float64), "bf16": (10, np.uint16), "tf32": (11, np.float32),
    "tf32_ftz": (12, np.float32),
}  # fmt: skip
POISON = 0xA5


def load(tensor_map, memory: np.ndarray, origin: int, coordinates, shared_base: int) -> np.ndarray:
    """What a bulk tensor load would leave in shared memory; every byte is written at most once."""
    shared = np.full(0x10000, POISON, np.uint8)
    writes = np.zeros(0x10000, int)
    for address, target, size, inside in tensor_map.chunks(coordinates, shared_base):
        data = memory[address - origin : address - origin + size] if inside else list(tensor_map.fill(size))
        assert not inside or 0 <= address - origin <= memory.size - size
        shared[target : target + size] = data
        writes[target : target + size] += 1
    assert writes.max() <= 1
    assert writes.sum() == tensor_map.box_bytes
    return shared


def unswizzle(shared: np.ndarray, base: int, pitch: int, rows: int, inner: int, width: int) -> np.ndarray:
    mask = width // 16 - 1 if width else 0
    out = np.empty((rows, inner), np.uint8)
    for r in range(rows):
        for c in range(inner):
            address = base + r * pitch + c
            out[r, c] = shared[address ^ (address >> 7 & mask) << 4]
    return out


def expected_box(tensor: np.ndarray, coordinates, box, steps, fill) -> np.ndarray:
    """numpy view, outermost first; coordinates, box and steps innermost first."""
    counts = [-(-b // s) for b, s in zip(box, steps, strict=True)]
    out = np.full(counts[::-1], fill, tensor.dtype)
    for index in np.ndindex(*counts[::-1]):
        at = [c + i * s for c, i, s in zip(coordinates[::-1], index, steps[::-1], strict=True)]
        if all(0 <= x < n for x, n in zip(at, tensor.shape, strict=True)):
            out[index] = tensor[tuple(at)]
    return out


@pytest.mark.parametrize("seed", range(60))
def test_random_boxes(seed):
    rng = np.random.default_rng([seed, 17])
    name = rng.choice(list(TYPES))
    code, dtype = TYPES[name]
    size = np.dtype(dtype).itemsize
    rank = int(rng.integers(1, 6))
    swizzle = int(rng.choice([0, 32, 64, 128]))
    inner_bytes = int(rng.choice([b for b in (16, 32, 48, 64, 112, 128) if b <= (swizzle or 128)]))
    element_strides = [1] * rank
    if rng.random() < 0.3:
        element_strides = [int(s) for s in rng.integers(1, 4, rank)]
    box = [min(inner_bytes // size * element_strides[0], 256), *map(int, rng.integers(1, 5, rank - 1))]
    if -(-box[0] // element_strides[0]) * size % 16:
        box[0], element_strides[0] = inner_bytes // size, 1
    dims = [int(rng.integers(1, 2 * box[0] + 8))] + [int(n) for n in rng.integers(1, 8, rank - 1)]
    # Row pitches padded to 16 bytes: the tensor is a view of a wider one.
    padded = -(-dims[0] * size // 16) * 16 // size + int(rng.integers(0, 3)) * 16 // size
    storage = rng.integers(0, 256, (*dims[:0:-1], padded * size), dtype=np.uint8)
    tensor = storage.view(dtype)[..., : dims[0]]
    if np.issubdtype(dtype, np.floating):
        storage.view(dtype)[...] = rng.standard_normal(storage.view(dtype).shape)
    strides = list(storage.strides[:-1])[::-1]
    origin = 0x7F0000001000
    fill_nan = bool(name in ("f16", "bf16", "f32", "f64", "tf32") and rng.random() < 0.5)
    m = RawTensorMap(origin, code, dims, strides, box, swizzle, fill_nan, element_strides)
    shared_base = int(rng.integers(0, 8)) * 128
    fill = 0 if not fill_nan else (0x7FFF if dtype == np.uint16 else np.nan)
    for _ in range(6):
        coordinates = [int(rng.integers(-b - 2, n + 3)) for b, n in zip(box, dims, strict=True)]
        shared = load(m, storage.reshape(-1), origin, coordinates, shared_base)
        box_expected = expected_box(tensor, coordinates, box, element_strides, fill)
        rows = int(np.prod(box_expected.shape[:-1]))
        inner = box_expected.shape[-1] * size
        got = unswizzle(shared, shared_base, swizzle or inner, rows, inner, swizzle)
        got = got.view(dtype).reshape(box_expected.shape)
        np.testing.assert_array_equal(got, box_expected, err_msg=f"{name} {dims} {box} {coordinates}")


def test_rows_far_outside_complete_the_full_box():
    m = RawTensorMap(0x1000, 0, [128, 4], [128], [128, 64], 128)
    chunks = m.chunks([0, 1000], 0)
    assert sum(size for _, _, size, _ in chunks) == m.box_bytes == 128 * 64
    assert not any(inside for *_, inside in chunks)
    chunks = m.chunks([-(2**31), 2**31 - 1], 0)
    assert not any(inside for *_, inside in chunks)


def test_the_swizzle_hangs_on_the_address():
    """The same box 128 bytes further lands in another permutation of columns."""
    m = RawTensorMap(0, 0, [128, 8], [128], [128, 8], 128)
    at_0 = [target % 128 for _, target, _, _ in m.chunks([0, 0], 0)][:8]
    at_128 = [target % 128 for _, target, _, _ in m.chunks([0, 0], 128)][:8]
    assert at_0 == list(range(0, 128, 16))
    assert at_128 == [16 * (i ^ 1) for i in range(8)]


def test_encode_and_replace():
    m = RawTensorMap(0x1000, 10, [64, 32, 2**32], [128, 4096], [64, 16, 1], 128, True, [1, 2, 1])
    data = m.encode()
    assert len(data) == 128
    again = RawTensorMap.decode(data)
    assert again.encode() == data
    assert again.chunks([0, 3, 1], 1024) == m.chunks([0, 3, 1], 1024)
    assert m.replace("global_address", 0, 0x2000) == ""
    assert m.replace("global_dim", 1, 5) == ""
    assert m.replace("global_stride", 0, 256) == ""
    changed = RawTensorMap(0x2000, 10, [64, 5, 2**32], [256, 4096], [64, 16, 1], 128, True, [1, 2, 1])
    assert m.encode() == changed.encode()
    assert m.replace("rank", 0, 1) == m.replace("box_dim", 1, 8) == m.replace("swizzle_mode", 0, 2) == ""
    assert "at most the swizzle's 64" in m.why_invalid()


@pytest.mark.parametrize(
    "field,ordinal,value,message",
    [
        ("rank", 0, 5, "rank - 1 is 5, expected 0 to 4"),
        ("box_dim", 0, 257, "box_dim is 257, expected 1 to 256"),
        ("box_dim", 5, 1, "ordinal is 5, expected 0 to 4"),
        ("global_stride", 4, 16, "ordinal is 4, expected 0 to 3"),
        ("global_stride", 0, 2**40, "global_stride"),
        ("element_stride", 0, 9, "element_stride is 9"),
        ("elemtype", 0, 13, "elemtype is 13"),
        ("swizzle_mode", 0, 4, "swizzle_mode is 4"),
    ],
)
def test_replace_refuses(field, ordinal, value, message):
    m = RawTensorMap(0x1000, 0, [128, 8], [128], [128, 8])
    before = m.encode()
    assert message in m.replace(field, ordinal, value)
    assert m.encode() == before


def arguments(**changes):
    base = {"address": 0x1000, "type": 0, "dims": [256, 8], "strides": [256], "box": [128, 8], "swizzle": 128}
    return {**base, **changes}


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"address": 0x1008}, "global address is 4104, expected a multiple of 16"),
        ({"dims": [256, 0]}, r"global dim\[1\] is 0"),
        ({"dims": [256, 2**32 + 1]}, r"global dim\[1\]"),
        ({"strides": [264]}, r"global stride\[1\] is 264, expected a multiple of 16"),
        ({"strides": [2**40]}, r"global stride\[1\]"),
        ({"box": [128, 257]}, r"box\[1\] is 257, expected 1 to 256"),
        ({"box": [0, 8]}, r"box\[0\] is 0"),
        ({"box": [24, 8], "swizzle": 0}, "inner box is 24, expected a multiple of 16"),
        ({"box": [144, 8]}, "inner box is 144, expected at most the swizzle's 128 bytes"),
        ({"element_strides": [1, 9]}, r"element stride\[1\] is 9"),
        ({"fill_nan": True}, "fill is NaN, expected zeros for element type u8"),
        ({"type": 13}, "element type is 13"),
        ({"swizzle": 96}, "swizzle is 96, expected 0, 32, 64 or 128"),
        ({"strides": []}, "strides one fewer"),
        ({"dims": [1] * 6, "strides": [16] * 5, "box": [16] + [1] * 5}, "1 to 5 entries"),
    ],
)
def test_errors_name_argument_value_and_expectation(changes, message):
    with pytest.raises(ValueError, match=message):
        RawTensorMap(**arguments(**changes))


def test_bytes_that_are_no_map():
    for data in (b"", bytes(128), b"\xff" * 128):
        with pytest.raises(ValueError, match="no tensor map"):
            RawTensorMap.decode(data)


def test_the_driver_numbers_types_in_another_order():
    from cuda.bindings.driver import CUtensorMapDataType as Driver

    names = [name for name in dir(Driver) if name.startswith("CU_TENSOR_MAP_DATA_TYPE_") and "U4" not in name]
    short = {"UINT": "u", "INT": "s", "FLOAT": "f", "BFLOAT": "bf", "TFLOAT": "tf"}
    seen = set()
    for name in names:
        value = int(getattr(Driver, name))
        if value > 12:
            continue
        kind, bits, ftz = re.fullmatch(r"CU_TENSOR_MAP_DATA_TYPE_([A-Z]+)(\d+)(_FTZ)?", name).groups()
        mine = f"{short[kind]}{bits}{'_ftz' if ftz else ''}"
        assert leaves.element_type_of_driver(value) == TYPES[mine][0], name
        seen.add(mine)
    assert seen == set(TYPES)
    with pytest.raises(ValueError, match="data type is 13"):
        leaves.element_type_of_driver(13)
