"""Rewrites a GGUF file with its matrices in another type: the same model, another size.

usage: requantize.py SOURCE.gguf TYPE TARGET.gguf     (TYPE: F32, F16, BF16, Q8_0, Q5_0, Q4_0, ...)

Two-dimensional tensors, the embedding too, are dequantised to F32 and quantised to TYPE; the rest (norms,
biases) stays as it is. Needs the PyPI packages gguf and numpy. Metadata is copied, `general.file_type`
set to the new type.
"""

import os
import sys
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType

WRITTEN_BY_THE_WRITER = {"general.architecture", "general.file_type", "GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"}


def copy_metadata(reader: GGUFReader, writer: GGUFWriter) -> None:
    for name, field in reader.fields.items():
        if name in WRITTEN_BY_THE_WRITER:
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=inner)


def requantize(source: Path, kind: GGMLQuantizationType, target: Path) -> None:
    reader = GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    # Written beside the target and renamed: a broken run leaves no half a model behind.
    partial = target.with_suffix(".partial")
    writer = GGUFWriter(partial, architecture)
    copy_metadata(reader, writer)
    writer.add_file_type(LlamaFileType["ALL_F32" if kind.name == "F32" else f"MOSTLY_{kind.name}"])
    for tensor in reader.tensors:
        if len(tensor.shape) < 2:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, target)


def main() -> None:
    if len(sys.argv) != 4 or sys.argv[2].upper() not in GGMLQuantizationType.__members__:
        sys.exit(__doc__)
    target = Path(sys.argv[3])
    target.parent.mkdir(parents=True, exist_ok=True)
    requantize(Path(sys.argv[1]), GGMLQuantizationType[sys.argv[2].upper()], target)
    print(target)


if __name__ == "__main__":
    main()
