"""qwenvl convert FOLDER --to FOLDER: published weights (*.bin or *.safetensors) as the trainer reads them."""

from __future__ import annotations

import argparse


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="qwenvl convert",
        description="Published weights (*.bin or *.safetensors) into safetensors of the same keys, with config.json "
        "and tokenizer.json. A whole model's names and shapes are checked first; a lone language model or CLIP becomes "
        "a part for model.init. The same command goes on where it was interrupted.",
    )
    made.add_argument("source", metavar="FOLDER", help="folder or s3:// address with config.json and the weights")
    made.add_argument("--to", required=True, metavar="FOLDER", help="folder or s3:// address to write")
    made.add_argument("--family", default=None, help="where config.json's model_type does not tell")
    made.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default=None, help="default: as stored")
    return made


def main(words: list[str]) -> int:
    asked = parser().parse_args(words[1:])
    from trainer.before.convert import convert

    record = convert(asked.source, asked.to, family=asked.family, dtype=asked.dtype)
    print(f"{len(record['files'])} files in {asked.to}")
    return 0
