"""The files of a GGUF model: split models, and files that are not GGUF or damaged."""

import pytest
from gguf import GGMLQuantizationType as Quantization
from gguf_files import assert_refused, assert_same_tree, write_both

from msn_jax import hugging_face
from msn_jax.gguf import load, model

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_any_file_of_a_split_model_stands_for_all(tmp_path):
    path, directory, cfg = write_both(tmp_path, "llama", split=8)
    parts = sorted(path.parent.glob("model-*.gguf"))
    assert len(parts) == 3
    expected = hugging_face.load_params(directory, cfg)
    for part in parts:
        assert_same_tree(load.load_params(part, model.load_config(part)), expected)
    parts[1].unlink()
    for part in (parts[0], parts[2]):
        assert_refused(part, f"{parts[1]}: is missing: {part.name} is part of a model of 3 files: copy all there")
    lone = parts[0].rename(path.with_name("lone.gguf"))
    assert_refused(
        lone, f"{lone}: key 'split.count' is 3, but the file's name implies 1: give the files back their names"
    )


def test_other_files_are_refused(tmp_path):
    path, _, _ = write_both(tmp_path, "llama", Quantization.Q8_0)
    content = path.read_bytes()

    def changed(name, content):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    text = changed("text.gguf", b"not a model")
    assert_refused(text, f"{text}: not a GGUF file: it does not begin with GGUF")
    assert_refused(changed("empty.gguf", b""), "empty.gguf: cannot be read as a GGUF file")
    for length in (20, 200, 3000, len(content) - 40):
        short = changed("short.gguf", content[:length])
        assert_refused(short, f"{short}: is truncated, at {length} bytes: download or copy it again")
    assert_refused(
        changed("old.gguf", content[:4] + b"\1\0\0\0" + content[8:]), "is version 1 GGUF: convert it to version 3"
    )
    assert_refused(
        changed("big.gguf", content[:4] + b"\0\0\0\3" + content[8:]), "is big-endian GGUF: convert it to version 3"
    )
    other = changed("other.gguf", content.replace(b"llama", b"gemma"))
    assert_refused(other, f"{other}: key 'general.architecture' is 'gemma': supported are llama, qwen2, qwen3")
    number = content.replace(
        b"blk.0.ffn_up.weight\2\0\0\0" + _dims(32, 64) + b"\x08",
        b"blk.0.ffn_up.weight\2\0\0\0" + _dims(32, 64) + b"\x63",
    )
    unknown = changed("unknown.gguf", number)
    assert_refused(
        unknown, "tensor 'blk.0.ffn_up.weight' has quantization number 99: the package gguf cannot dequantize it"
    )


def _dims(*dims):
    return b"".join(dim.to_bytes(8, "little") for dim in dims)
