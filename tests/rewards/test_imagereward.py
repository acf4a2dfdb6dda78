"""ImageReward against its parts from other packages: timm's ViT and transformers' BERT, whose names its file has."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizer

from diffalign.errors import UserError
from diffalign.rewards.load import load
from diffalign.types import Media, Prompts
from reward_models import _clip

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"abcdefghijklmnopqrstuvwxyz",
    "red",
    "star",
    "##s",
    "two",
    "photo",
]
TEXTS = ["two red stars", "a photo of something else", "", "red " * 60]


class Reference(nn.Module):
    """The model under the names of its authors' file, run as their code runs it."""

    def __init__(self) -> None:
        super().__init__()
        self.blip = nn.Module()
        self.blip.visual_encoder = VisionTransformer(
            img_size=32, patch_size=8, embed_dim=128, depth=2, num_heads=2, num_classes=0, global_pool=""
        )
        config = BertConfig(
            vocab_size=len(WORDS) + 2,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=1,
            intermediate_size=96,
            max_position_embeddings=64,
            type_vocab_size=1,
            is_decoder=True,
            add_cross_attention=True,
            encoder_hidden_size=128,
        )
        self.blip.text_encoder = BertModel(config, add_pooling_layer=False)
        # BLIP attends both ways; BERT has its second attention only as a decoder, and looks at this when it makes its mask.
        self.blip.text_encoder.config.is_decoder = False
        for layer in self.blip.text_encoder.encoder.layer:
            width = layer.crossattention.self.key.out_features
            layer.crossattention.self.key = nn.Linear(128, width)
            layer.crossattention.self.value = nn.Linear(128, width)
        self.mlp = nn.Module()
        self.mlp.layers = nn.Sequential(
            nn.Linear(64, 32), nn.Dropout(0.2), nn.Linear(32, 16), nn.Dropout(0.2), nn.Linear(16, 8), nn.Dropout(0.1)
        ).extend([nn.Linear(8, 4), nn.Linear(4, 1)])

    def forward(self, pictures: torch.Tensor, told: dict[str, torch.Tensor]) -> torch.Tensor:
        seen = self.blip.visual_encoder(pictures)
        hidden = self.blip.text_encoder(
            told["input_ids"], told["attention_mask"], encoder_hidden_states=seen
        ).last_hidden_state
        return (self.mlp.layers(hidden[:, 0])[:, 0] - 0.16717) / 1.03334


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The reference, and a folder with its file as published and the vocabulary."""
    place = tmp_path_factory.mktemp("imagereward")
    torch.manual_seed(0)
    net = Reference().eval()
    with torch.no_grad():
        net.blip.text_encoder.embeddings.token_type_embeddings.weight.zero_()  # BLIP has none
        for parameter in net.parameters():  # fresh LayerNorms and biases would hide a wrong name
            parameter += 0.1 * torch.randn(parameter.shape)
        for parameter in net.mlp.parameters():
            parameter *= 3
        net.blip.text_encoder.embeddings.token_type_embeddings.weight.zero_()
    weights = {k: v for k, v in net.state_dict().items() if "token_type" not in k}
    weights["blip.text_encoder.embeddings.position_ids"] = torch.arange(64)[None]
    torch.save(weights, place / "ImageReward.pt")
    (place / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return net, place


def given(side=(48, 64)) -> tuple[Media, Prompts]:
    pixels = torch.rand(len(TEXTS), 1, 3, *side, generator=torch.Generator().manual_seed(1))
    pixels = torch.round(pixels * 255) / 255
    keys = np.arange(len(TEXTS))
    return Media(pixels), Prompts(list(TEXTS), keys, keys, keys, [{} for _ in TEXTS])


def expected(net: Reference, media: Media, place) -> torch.Tensor:
    """With PIL's bicubic resizing and a tokenizer from the vocabulary file."""
    shots = []
    for frame in (media.pixels[:, 0] * 255).round().byte().permute(0, 2, 3, 1).numpy():
        height, width = frame.shape[:2]
        scale = 32 / min(height, width)
        small = Image.fromarray(frame).resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
        left, top = (small.width - 32) // 2, (small.height - 32) // 2
        shots.append(np.asarray(small.crop((left, top, left + 32, top + 32))))
    pixels = torch.from_numpy(np.stack(shots)).permute(0, 3, 1, 2).float() / 255
    tokens = BertTokenizer(vocab=str(place / "vocab.txt"))
    told = tokens(TEXTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    with torch.no_grad():
        return net(_clip.normalised(pixels), told)


@pytest.mark.parametrize(("side", "share"), [((32, 32), 1e-5), ((48, 64), 0.1)])
def test_it_agrees_with_the_authors_formula_on_other_packages(published, side, share):
    """Without resizing only the order of float32 sums differs; with it the reference's pictures are rounded to 8 bits, of which this
    random network makes some hundredths of the scores' spread."""
    net, place = published
    media, prompts = given(side)
    wanted = expected(net, media, place)
    found = load(f"imagereward@{place}")(media, prompts)
    torch.testing.assert_close(found, wanted, atol=share * float(wanted.std()), rtol=0)
    assert wanted.std() > 1


def test_words_beyond_the_thirty_fifth_do_not_count(published):
    media, prompts = given()
    prompts.text[:] = ["red " * 33, "red " * 33 + "star", "red " * 34, "star"]
    media = Media(media.pixels[:1].expand(4, -1, -1, -1, -1))
    a, b, c, d = load(f"imagereward@{published[1]}")(media, prompts).tolist()
    assert a == pytest.approx(b, abs=1e-6) == pytest.approx(c, abs=1e-6)  # [CLS] and [SEP] are two of the 35
    assert abs(a - d) > 1e-3


def test_its_gradient_is_that_of_finite_differences_and_checkpointing_keeps_it(published):
    reward = load(f"imagereward@{published[1]}").reward
    media, prompts = given()
    reward.picture.double(), reward.text.double()
    pixels = media.pixels[:, 0].double() * 0.8 + 0.1  # where nothing is clamped
    x = pixels.clone().requires_grad_()
    (slope,) = torch.autograd.grad(reward.score(x, prompts.text).sum(), x)
    way = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    step = 1e-6
    higher, lower = (reward.score(pixels + sign * step * way, prompts.text).sum() for sign in (1, -1))
    numeric = (higher - lower) / (2 * step)
    torch.testing.assert_close((slope * way).sum(), numeric, rtol=1e-6, atol=1e-8)

    fresh = load(f"imagereward@{published[1]}")
    slopes = []
    for _ in range(2):
        x = media.pixels.clone().requires_grad_()
        slopes.append(torch.autograd.grad(fresh(Media(x), prompts).sum(), x)[0])
        fresh.checkpoint()
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        (
            "vocab.txt",
            "[PAD]\n[UNK]\n",
            r"vocab.txt holds 2 words, the weights know 36; allowed is that of google-bert",
        ),
        ("ImageReward.pt", "no pickle", "ImageReward.pt is not ImageReward.pt: it lacks BLIP's weights or its head's"),
        ("vocab.txt", None, "vocab.txt is no file; allowed is the file vocab.txt"),
    ],
)
def test_files_that_do_not_fit_are_named(published, tmp_path, file, content, problem):
    for source in published[1].iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=problem):
        load(f"imagereward@{tmp_path}")
