"""GGUF headers: what the package `gguf` writes is read, and no file makes more of itself than it is."""

import resource
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfast.weights.gguf import GGUFFile

TOKENS = ["a", "", "ï»¿☃", "b" * 300]
VALUES = {
    "u8": (200, gguf.GGUFValueType.UINT8),
    "i8": (-3, gguf.GGUFValueType.INT8),
    "u16": (60000, gguf.GGUFValueType.UINT16),
    "i16": (-3000, gguf.GGUFValueType.INT16),
    "u32": (2**32 - 1, gguf.GGUFValueType.UINT32),
    "i32": (-5, gguf.GGUFValueType.INT32),
    "u64": (2**64 - 1, gguf.GGUFValueType.UINT64),
    "i64": (-(2**63), gguf.GGUFValueType.INT64),
    "f32": (0.5, gguf.GGUFValueType.FLOAT32),
    "f64": (1e300, gguf.GGUFValueType.FLOAT64),
    "yes": (True, gguf.GGUFValueType.BOOL),
    "text": ("naïve ☃", gguf.GGUFValueType.STRING),
}
ARRAYS = {"tokens": TOKENS, "types": [1, 2, -3], "scores": [0.5, -1.5], "flags": [True, False]}


def written(path: Path) -> dict[str, np.ndarray]:
    """A small file of the package's own writer, and the tensors in it."""
    generator = np.random.default_rng(0)
    floats = generator.normal(size=(6, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(path, "llama")
    for key, (value, kind) in VALUES.items():
        writer.add_key_value(key, value, kind)
    for key, array in ARRAYS.items():
        writer.add_array(key, array)
    writer.add_tensor("vector", floats[0])
    writer.add_tensor("matrix", floats)
    writer.add_tensor("halves", floats.astype(np.float16))
    writer.add_tensor("cube", floats.reshape(2, 3, 64))
    for kind in ("BF16", "Q8_0", "Q4_0"):
        type_ = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(kind, gguf.quants.quantize(floats, type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {"vector": floats[0], "matrix": floats, "cube": floats.reshape(2, 3, 64)}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    return path, written(path)


def test_values_are_those_that_were_written(small):
    metadata = GGUFFile(small[0]).metadata
    assert metadata["general.architecture"] == "llama"
    for key, (value, _) in VALUES.items():
        assert (type(metadata[key]), metadata[key]) == (type(value), value)
    for key, array in ARRAYS.items():
        assert len(metadata[key]) == len(array)
        assert metadata[key].tolist() == list(metadata[key]) == array
    assert repr(metadata["tokens"]) == "<4 strings of small.gguf>"


def test_tensors_are_those_that_the_package_reads(small):
    path, floats = small
    file, theirs = GGUFFile(path), {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert file.tensors.keys() == theirs.keys()
    for name, tensor in file.tensors.items():
        data = np.asarray(theirs[name].data)
        assert tensor.type == theirs[name].tensor_type.name and tensor.nbytes == theirs[name].n_bytes
        assert bytes(tensor.read().reshape(-1).view(torch.uint8).numpy()) == data.tobytes()
        assert torch.equal(tensor.read(slice(1, 3)), tensor.read()[1:3])
        assert len(tensor.read(slice(2, 2))) == 0
    for name, expected in floats.items():
        assert np.array_equal(file.tensors[name].read().numpy(), expected)
    assert file.tensors["BF16"].read().dtype == torch.bfloat16 and file.tensors["BF16"].shape == (6, 64)
    assert file.tensors["Q8_0"].read().shape == (6, 68) and file.tensors["Q8_0"].read().dtype == torch.uint8


def test_what_is_read_can_be_changed_without_changing_the_file(small):
    tensor = GGUFFile(small[0]).tensors["matrix"]
    tensor.read().zero_()
    assert np.array_equal(tensor.read().numpy(), small[1]["matrix"])


# --- files that lie -------------------------------------------------------------------------------------------------


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def value(key: str, kind: int, content: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + content


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0, dimensions: int | None = None) -> bytes:
    count = len(shape) if dimensions is None else dimensions
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", count, *shape, kind, offset)


def header(
    values: list[bytes] = (), tensors: list[bytes] = (), counts: tuple[int, int] | None = None, version: int = 3
):
    tensor_count, value_count = counts or (len(tensors), len(values))
    return b"GGUF" + struct.pack("<IQQ", version, tensor_count, value_count) + b"".join([*values, *tensors])


def padded(data: bytes, alignment: int = 32, more: int = 256) -> bytes:
    return data + bytes(-len(data) % alignment) + bytes(more)


HUGE = struct.pack("<Q", 2**60)
U8, U32, BOOL, STRING, ARRAY = 0, 4, 7, 8, 9
LIES = {
    "empty": (b"", "does not begin with GGUF"),
    "another file": (b"PK\3\4" + bytes(100), "does not begin with GGUF"),
    "cut off in its counts": (header()[:12], "takes 8 bytes at 8, of 12"),
    "version 1": (header(version=1), "its version is 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "it is big-endian"),
    "more values than bytes": (padded(header(counts=(0, 2**63))), "takes|says"),
    "more tensors than bytes": (padded(header(counts=(2**63, 0))), "dimensions|takes"),
    "a name of 2^60 bytes": (header([HUGE + b"x"]), "a name has 1,152,921,504,606,846,976 bytes"),
    "a string of 2^60 bytes": (header([value("a", STRING, HUGE + b"x")]), "a string takes 1,152,921,504,606,846,976"),
    "an array of 2^60 numbers": (header([value("a", ARRAY, struct.pack("<I", U32) + HUGE)]), "the array a takes"),
    "an array of 2^60 strings": (
        header([value("a", ARRAY, struct.pack("<I", STRING) + HUGE + string("x"))]),
        "an array of 1,152,921,504,606,846,976 strings goes past the end",
    ),
    "an array whose last string is too long": (
        header([value("a", ARRAY, struct.pack("<IQ", STRING, 1) + HUGE)]),
        "an array of 1 strings goes past the end",
    ),
    "an array of arrays": (header([value("a", ARRAY, struct.pack("<IQIQ", ARRAY, 1, ARRAY, 1))]), "an array of arrays"),
    "a value of an unknown type": (header([value("a", 77, bytes(8))]), "a has the unknown type 77"),
    "an array of an unknown type": (header([value("a", ARRAY, struct.pack("<IQ", 77, 0))]), "of the unknown type 77"),
    "a truth value of 2": (header([value("a", BOOL, b"\2")]), "neither 0 nor 1"),
    "a key that is not UTF-8": (header([string(b"\xff") + struct.pack("<I", U8) + b"1"]), "is not UTF-8"),
    "a key twice": (header([value("a", U8, b"1")] * 2), "it says a twice"),
    "a tensor twice": (padded(header(tensors=[tensor("t", (8,))] * 2)), "it holds the tensor t twice"),
    "no dimensions": (padded(header(tensors=[tensor("t", ())])), "t has 0 dimensions"),
    "2^31 dimensions": (padded(header(tensors=[tensor("t", (8,), dimensions=2**31)])), "t has 2147483648 dimensions"),
    "a dimension of 0": (padded(header(tensors=[tensor("t", (8, 0))])), "t is (0, 8), which F32 has no room for"),
    "half a block": (padded(header(tensors=[tensor("t", (48,), 2)])), "t is (48,), which Q4_0 has no room for"),
    "too many numbers for 64 bits": (padded(header(tensors=[tensor("t", (2**40, 2**40))])), "t ends at"),
    "an offset past the end": (padded(header(tensors=[tensor("t", (8,), offset=2**62)])), "t ends at"),
    "one number past the end": (padded(header(tensors=[tensor("t", (65,))])), "t ends at"),
    "an offset between": (padded(header(tensors=[tensor("t", (8,), offset=8)])), "t begins at 8, which general.align"),
    "an unknown type": (padded(header(tensors=[tensor("t", (8,), 4)])), "t has type 4 of ggml, which is not known"),
    "bytes that are shared": (
        padded(header(tensors=[tensor("t", (16,)), tensor("u", (8,), offset=32)])),
        "the tensors t and u share bytes",
    ),
    "an alignment of 0": (
        padded(header([value("general.alignment", U32, bytes(4))])),
        "must be a power of two, and is 0",
    ),
    "a name that would clear the screen": (header([value("a\x1b[2J\n", U8, b"1")]), "characters that can't be printed"),
    "an alignment of 24": (
        padded(header([value("general.alignment", U32, struct.pack("<I", 24))])),
        "must be a power of two, and is 24",
    ),
    "an alignment in words": (
        padded(header([value("general.alignment", STRING, string("32"))])),
        "must be a power of two, and is '32'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", LIES)
def test_a_file_that_lies_is_an_error_that_names_it(tmp_path, what):
    content, complaint = LIES[what]
    path = tmp_path / "liar.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        GGUFFile(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert any(part in str(error.value) for part in complaint.split("|")), error.value


def test_another_alignment_is_kept(tmp_path):
    alignment = value("general.alignment", U32, struct.pack("<I", 64))
    content = padded(header([alignment], [tensor("t", (4,)), tensor("u", (4,), offset=64)]), 64, 0)
    path = tmp_path / "aligned.gguf"
    path.write_bytes(content + np.arange(4, dtype=np.float32).tobytes() + bytes(48) + np.ones(4, np.float32).tobytes())
    tensors = GGUFFile(path).tensors
    assert tensors["t"].read().tolist() == [0, 1, 2, 3] and tensors["u"].read().tolist() == [1, 1, 1, 1]


def test_a_token_that_is_not_utf_8_is_an_error_where_it_is_read(tmp_path):
    path = tmp_path / "tokens.gguf"
    path.write_bytes(header([value("a", ARRAY, struct.pack("<IQ", STRING, 1) + string(b"\xff"))]))
    tokens = GGUFFile(path).metadata["a"]
    with pytest.raises(ValueError, match=r"tokens.gguf holds a string that is not UTF-8: b'\\xff'"):
        tokens.tolist()


def test_a_truth_value_that_is_none_is_an_error_where_it_is_read(tmp_path):
    path = tmp_path / "flags.gguf"
    path.write_bytes(header([value("a", ARRAY, struct.pack("<IQ", BOOL, 3) + b"\x01\x00\x02")]))
    flags = GGUFFile(path).metadata["a"]
    with pytest.raises(ValueError, match="flags.gguf is damaged: a truth value is neither 0 nor 1"):
        flags.tolist()
    path.write_bytes(header([value("a", ARRAY, struct.pack("<IQ", BOOL, 2) + b"\x01\x00")]))
    assert GGUFFile(path).metadata["a"].tolist() == [True, False]


def test_a_file_that_became_shorter_is_a_value_error(tmp_path):
    path = tmp_path / "cut.gguf"
    written(path)
    tensor = GGUFFile(path).tensors["matrix"]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="cut.gguf can't be read any more"):
        tensor.read()


def read_all(path: Path) -> None:
    """Everything that a header promises, or `ValueError`."""
    try:
        file = GGUFFile(path)
        for content in file.metadata.values():
            if hasattr(content, "tolist"):
                content.tolist()
        for each in file.tensors.values():
            assert each.start + each.nbytes <= path.stat().st_size
            each.read()
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)


@settings(max_examples=300)
@given(data=st.data())
def test_whatever_is_changed_in_a_file_it_is_read_or_a_value_error(small, data):
    content = bytearray(small[0].read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, min(len(content), 1400) - 1))
        length = data.draw(st.integers(1, 8))
        content[at : at + length] = data.draw(st.binary(min_size=length, max_size=length))
    end = data.draw(st.none() | st.integers(0, len(content)))
    path = small[0].with_name("changed.gguf")
    path.write_bytes(content[:end])
    read_all(path)


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_no_lie_asks_for_much_memory(tmp_path):
    """All of them in a process that may take 64 MB more than it has once everything is imported."""
    for number, (content, _) in enumerate(LIES.values()):
        (tmp_path / f"{number}.gguf").write_bytes(content)
    code = f"""
import resource, gguf
from pathlib import Path
from llmfast.weights.gguf import GGUFFile
pages = int(Path("/proc/self/statm").read_text().split()[0])
most = pages * {resource.getpagesize()} + (64 << 20)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
for path in Path({str(tmp_path)!r}).iterdir():
    try:
        GGUFFile(path)
    except ValueError:
        continue
    raise AssertionError(path)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
