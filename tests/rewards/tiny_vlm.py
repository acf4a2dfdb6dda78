"""Vision-language models of transformers' own classes with random weights, laid out as the hub does: 100 kB each, made in a second."""

import json

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
WORDS = [
    "yes",
    "no",
    "Yes",
    "No",
    "one",
    "two",
    "three",
    "1",
    "2",
    "3",
    "excellent",
    "good",
    "fair",
    "poor",
    "bad",
    "red",
    "white",
]
TEXTS = [f"{word} {word}" for word in WORDS] + ["user", "assistant", "How would you rate the quality of this image?"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": 8,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 32 * 32, "longest_edge": 64 * 64},
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.5, 0.6, 0.7],
}


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and the words of `WORDS` as tokens of their own, with and without a space."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        TEXTS * 3,
        trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=list(SPECIAL),
        chat_template=TEMPLATE,
    )  # fmt: skip


def config(kind: str, words: PreTrainedTokenizerFast):
    text = {
        "vocab_size": len(words) + 5, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True},
        "pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id, "bos_token_id": words.pad_token_id,
    }  # fmt: skip
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    if kind == "qwen2_5_vl":
        vision |= {"intermediate_size": 48, "out_hidden_size": 32, "window_size": 32, "fullatt_block_indexes": [1]}
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    else:
        vision |= {"intermediate_size": 48, "out_hidden_size": 32, "num_position_embeddings": 64}
        text["head_dim"] = 8
    if kind == "qwen3_vl":
        vision["deepstack_visual_indexes"] = [0]
    if kind == "qwen3_5":
        text |= {
            "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
            "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        }  # fmt: skip
        text["rope_parameters"] |= {"partial_rotary_factor": 1.0}
    special = {
        "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }  # fmt: skip
    ids = {key: words.convert_tokens_to_ids(token) for key, token in special.items()}
    return AutoConfig.for_model(kind, text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)


def save(kind: str, place, dtype=torch.float32):
    """A model of a family (`model_type`) in a folder."""
    words = tokenizer()
    torch.manual_seed(0)
    net = AutoModelForImageTextToText.from_config(config(kind, words)).to(dtype)
    for name, weight in net.named_parameters():
        if weight.ndim > 1:  # the usual 0.02 would leave what it says nearly the same for every picture
            torch.nn.init.normal_(weight, std=0.5 if "lm_head" in name else 0.2)
    net.save_pretrained(place)
    words.save_pretrained(place)
    (place / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return place
