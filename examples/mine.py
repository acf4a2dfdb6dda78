"""A reward of your own: any function from media and prompts to one number a sample.

diffalign train configs/flow_grpo/shapes-sd3.yaml 'rewards={./examples/mine.py:blueness: 1.0}' run_dir=runs/mine
"""

DIFFERENTIABLE = ["blueness"]  # keeps the gradient to the pixels: truncated_bp can use it too


def blueness(media, prompts):
    """How much bluer than red a picture is, in [-1, 1].

    `media.pixels` is (N, F, 3, H, W) in [0, 1], F frames: 1 for pictures. `prompts.text` are the N prompts, `prompts.metadata` what else
    their file says of each.
    """
    red, blue = media.pixels[:, 0, 0], media.pixels[:, 0, 2]
    return (blue - red).flatten(1).mean(1)
