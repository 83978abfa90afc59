"""One file a family: a small config.json with every structural feature on, from which its rules are tested.

FAMILY          name in trainer.models.family.FAMILIES
config()        config.json without vocab_size and token ids: the harness fills them in from its tokenizer
RECIPE          changes of the harness's recipe, where the family needs some (nested like a recipe)
HUGGING_FACE    False where transformers has no such model: rule 1 then has references of its own in test_FAMILY.py
"""
