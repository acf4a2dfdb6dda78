"""The shapes world: a procedural benchmark with an exact judge, and tiny diffusers pipelines pretrained on it.

`world` renders scenes, `captions` writes GenEval-style prompts and splits, `detector` judges pictures,
`models` finds the pipelines that ship with the package, `pretrain` makes them.
"""
