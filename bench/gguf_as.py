"""A GGUF file in another of llama.cpp's types, for bench: what is stored in blocks is rounded anew.

    .venv-peers/bin/python bench/gguf_as.py MODEL.gguf OUT.gguf [--type Q4_0]

All else (metadata, vectors, matrices in other types than the most frequent one) stays as it is. Numbers
are rounded twice: those of a file that was rounded from the original weights are better.
"""

from collections import Counter
from pathlib import Path

import click
import gguf


@click.command()
@click.argument("source", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--type", "wanted", default="Q4_0", show_default=True, help="As gguf names it.")
def main(source: Path, out: Path, wanted: str) -> None:
    """Write SOURCE with the type of its layers' matrices changed."""
    reader = gguf.GGUFReader(source)
    architecture = reader.get_field("general.architecture").contents()
    writer = gguf.GGUFWriter(out, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        element = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=element)
    stored = Counter(tensor.tensor_type for tensor in reader.tensors if len(tensor.shape) == 2)
    rounded = stored.most_common(1)[0][0]
    to = gguf.GGMLQuantizationType[wanted]
    for tensor in reader.tensors:
        data = tensor.data
        kind = tensor.tensor_type
        if kind == rounded:
            data = gguf.quants.quantize(gguf.quants.dequantize(data, kind), to)
            kind = to
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    click.echo(f"{out}: {stored[rounded]} matrices of {rounded.name} as {to.name}")


if __name__ == "__main__":
    main()
